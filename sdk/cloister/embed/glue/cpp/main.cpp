// Asks once (`chat "Is it cold?"`), or holds a conversation on standard input, a line a turn.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "bundle.h"

namespace {

cloister::Chat* chat = nullptr;

const char* name(cloister::Result result) {
  const char* const names[] = {"ended", "stopped", "limit", "context full"};
  return names[static_cast<int>(result)];
}

void ask(const std::string& text) {
  const auto show = [](std::string_view piece) { std::cout << piece << std::flush; };
  const auto result = chat->say(text, show);
  std::cout << "\n" << std::flush;
  std::cerr << "[" << name(result) << "]\n";
  if (result == cloister::Result::context_full) chat->reset();
}

int usage() {
  std::cerr << "chat [--model DIR] [--system TEXT] [--limit TOKENS] [--memory BYTES] [--mark FILE]"
               " [--read] [--cache on|off] [TEXT]\n"
               "  --read   read the program's file into memory; else it is mapped\n"
               "  --cache  XNNPACK's weights cache; else as ExecuTorch was built\n";
  return 2;
}

}  // namespace

int main(int count, char** values) {
  std::vector<std::string> words(values + 1, values + count), texts;
  std::string directory = CLOISTER_MODEL;
  cloister::Settings settings;
  settings.progress = [](std::string_view step, double part) {
    std::cerr << "\r" << step << " " << int(100 * part) << " %" << (part < 1 ? "" : "\n");
  };
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--read") {
      settings.mapped = false;
    } else if (word.rfind("--", 0) != 0) {
      texts.push_back(word);
    } else if (++i == words.size()) {
      return usage();
    } else if (word == "--model") {
      directory = words[i];
    } else if (word == "--system") {
      settings.system = words[i];
    } else if (word == "--limit") {
      settings.limit = std::atoi(words[i].c_str());
    } else if (word == "--memory") {
      settings.available_bytes = std::strtoull(words[i].c_str(), nullptr, 10);
    } else if (word == "--mark") {
      settings.mark = words[i];
    } else if (word == "--cache") {
      settings.weights_cache = words[i] == "on";
    } else {
      return usage();
    }
  }
  if (texts.size() > 1) return usage();
  try {
    cloister::Chat it(cloister::bundle(), directory, settings);
    chat = &it;
    std::signal(SIGINT, [](int) { chat->stop(); });
    if (!texts.empty()) return ask(texts[0]), 0;
    for (std::string line; std::getline(std::cin, line);) {
      try {
        ask(line);
      } catch (const cloister::Refused& refused) {
        std::cerr << refused.what() << "\n";
      }
    }
  } catch (const cloister::Refused& refused) {
    std::cerr << refused.what() << "\n";
    return 1;
  }
}
