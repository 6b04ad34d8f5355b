// A chat with one language model, on the stock text runner of ExecuTorch 1.4.1.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace cloister {

struct File {
  std::string name;
  std::string sha256;  // lower-case hexadecimal
  std::uint64_t size_bytes;
};

struct Around {
  std::string before, after;
};

// Raw text for the model, and what it says to it where always the likeliest token is taken.
struct Check {
  std::string prompt, answer;
  int tokens;  // of the answer, the one that ends it counted
};

// What the glue must know of a model; bundle.h says it of this one.
struct Bundle {
  std::string name;
  std::string executorch;  // release that made the program
  File program, tokenizer;
  int context;                  // tokens
  std::uint64_t memory_bytes;   // that loading takes
  std::string begin;            // before a conversation without system prompt
  std::optional<Around> system;  // none: the model knows no system prompt
  Around user, assistant;
  std::string answer;  // where an answer is to come
  bool strip;          // texts lose the white space at both ends
  std::vector<std::string> ends, special;
  std::vector<Check> checks;
};

enum class Reason {
  missing_file, changed_file, too_little_memory, cannot_load, wrong_answer, bad_setting,
  no_system_prompt, special_text, unreadable_text, busy, closed, failed,
};

// An error with a name. Its message says what to do, and holds nothing that the user typed.
struct Refused : std::runtime_error {
  Refused(Reason why, const std::string& message) : std::runtime_error(message), reason(why) {}
  Reason reason;
};

enum class Result { ended, stopped, limit, context_full };

struct Settings {
  std::string system;        // prompt; empty: none
  int limit = 256;           // tokens of an answer
  float temperature = 0.0f;  // 0 to 1; 0 takes the likeliest token, as the first always is
  bool mapped = true;        // the program stays in its file; false: it is read into memory
  std::optional<bool> weights_cache;  // XNNPACK's; none: as ExecuTorch was built (phones: on)
  std::uint64_t available_bytes = 0;  // that the app may take; 0: ask the system
  std::string mark;  // file that remembers a passed first start; empty: check at each start
  std::function<void(std::string_view step, double part)> progress;  // of a start, 0 to 1
};

class Chat {
 public:
  // Checks the files in `directory`, loads the model and lets it check itself; takes seconds.
  Chat(const Bundle& bundle, const std::string& directory, Settings settings = {});
  ~Chat();  // no `say` may be running

  // Gives each piece of the answer to `piece`, in whole characters. Later turns read only what is
  // new. At `context_full` the answer was cut, or (no piece came) the text did not fit.
  Result say(const std::string& text, const std::function<void(std::string_view)>& piece);

  void stop();   // from any thread or a signal handler: `say` returns after the next token
  void reset();  // the next turn begins a new conversation
  void close();  // gives the memory back, at the end of a `say` that is running

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace cloister
