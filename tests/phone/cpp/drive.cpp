// Does to a chat what lines on standard input say, and writes what came of it, a line an event.
#include <iostream>
#include <sstream>
#include <thread>

#include "bundle.h"

namespace {

using cloister::Chat;
using cloister::Refused;

const char* const kResults[] = {"ended", "stopped", "limit", "context_full"};
const char* const kReasons[] = {
    "missing_file", "changed_file", "too_little_memory", "cannot_load", "wrong_answer",
    "bad_setting", "no_system_prompt", "special_text", "unreadable_text", "busy", "closed",
    "failed"};

void refused(const Refused& error) {
  std::cout << "refused " << kReasons[static_cast<int>(error.reason)] << " " << error.what()
            << std::endl;
}

// Says `text`, and does `what` once `after` pieces have come.
void say(Chat& chat, const std::string& what, int after, const std::string& text) {
  int pieces = 0;
  const auto result = chat.say(text, [&](std::string_view piece) {
    std::cout << "piece ";
    for (const unsigned char byte : piece) std::cout << int(byte) << ",";
    std::cout << std::endl;
    if (++pieces != after) return;
    if (what == "stop") chat.stop();
    if (what == "close") chat.close();
    if (what == "throw") throw std::runtime_error("the app's own");
    if (what == "twice") std::thread([&] {
      try {
        chat.say("again", [](std::string_view) {});
      } catch (const Refused& error) {
        refused(error);
      }
    }).join();
  });
  std::cout << "result " << kResults[static_cast<int>(result)] << std::endl;
}

}  // namespace

int main(int count, char** values) try {
  cloister::Bundle bundle = cloister::bundle();
  cloister::Settings settings;
  settings.weights_cache = true;
  settings.progress = [](std::string_view step, double part) {
    std::cout << "progress " << part << " " << step << std::endl;
  };
  std::string directory;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = values[i], value = values[i + 1];
    if (name == "directory") directory = value;
    if (name == "system") settings.system = value;
    if (name == "limit") settings.limit = std::stoi(value);
    if (name == "temperature") settings.temperature = std::stof(value);
    if (name == "memory") settings.available_bytes = std::stoull(value);
    if (name == "mark") settings.mark = value;
    if (name == "cache") settings.weights_cache = value == "on";
    if (name == "load") settings.mapped = value == "mapped";
    if (name == "wrong") bundle.checks.at(std::stoul(value)).answer += "!";
    if (name == "end") bundle.ends.push_back(value);
    if (name == "strip") bundle.strip = true;
    if (name == "without") bundle.system.reset();
  }
  Chat chat(bundle, directory, settings);
  std::cout << "ready" << std::endl;
  for (std::string line, what, text; std::getline(std::cin, line);) {
    std::istringstream words(line);
    int after = 0;
    words >> what >> after;
    std::getline(words >> std::ws, text);
    try {
      if (what == "reset") {
        chat.reset();
        continue;
      }
      say(chat, what, after, text);
    } catch (const Refused& error) {
      refused(error);
    } catch (const std::exception& error) {
      std::cout << "thrown " << error.what() << std::endl;
    }
  }
} catch (const Refused& error) {
  refused(error);
}
