#include "cloister.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <fstream>
#include <mutex>
#include <utility>

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/platform/platform.h>
#ifdef CLOISTER_WHEEL
#include "wheel.h"
#else
#include <executorch/extension/llm/runner/text_llm_runner.h>
#include <pytorch/tokenizers/tokenizer.h>
#endif

#include "sha256.h"
#include "text.h"

namespace cloister {
namespace {

namespace llm = executorch::extension::llm;
namespace runtime = executorch::runtime;
using LoadMode = executorch::extension::Module::LoadMode;
using Progress = std::function<void(std::string_view, double)>;
using Piece = std::function<void(std::string_view)>;

// ExecuTorch's messages may hold what the user typed ("Failed to encode prompt ...", 1.4.1).
void silence() {
  static const bool done = runtime::register_pal(runtime::PalImpl::create(
      [](et_timestamp_t, et_pal_log_level_t, const char*, const char*, std::size_t, const char*,
         std::size_t) {},
      __FILE__));
  (void)done;
}

void check_file(const std::string& path, const File& file, const Progress& progress) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw Refused(Reason::missing_file, file.name + " is not there or cannot be read; install "
                                        "or download the model again.");
  }
  Sha256 hash;
  std::uint64_t size = 0;
  std::vector<char> block(1 << 20);
  while (in.read(block.data(), static_cast<std::streamsize>(block.size())), in.gcount() > 0) {
    const auto count = static_cast<std::size_t>(in.gcount());
    hash.update(reinterpret_cast<const unsigned char*>(block.data()), count);
    progress("hashing " + file.name, double(size += count) / double(file.size_bytes));
  }
  if (size != file.size_bytes || hash.hexadecimal() != file.sha256) {
    throw Refused(Reason::changed_file, file.name + " is not the file that the app was made "
                                        "with; install or download the model again.");
  }
}

// Bytes that can be had without paging, on Linux and Android; 0 where the system is not known.
std::uint64_t available_bytes() {
  std::ifstream in("/proc/meminfo");
  std::string key;
  for (std::uint64_t kilobytes = 0; in >> key >> kilobytes; std::getline(in, key)) {
    if (key == "MemAvailable:") return kilobytes * 1024;
  }
  return 0;
}

}  // namespace

struct Chat::State {
  const Bundle bundle;
  const Settings settings;
  std::unique_ptr<llm::TextLLMRunner> runner{};  // owns the tokenizer
  ::tokenizers::Tokenizer* tokenizer = nullptr;
  std::string opening{};  // of every conversation
  std::string next{};     // what the model has to read before the next text of the user
  int position = 0;       // tokens in the KV cache
  std::mutex mutex{};     // of the two below
  bool busy = false, closed = false;
  std::atomic<bool> stop{false};

  void load(const std::string& directory);
  void check_answers();
  void refuse_special(const std::string& text) const;
  Result generate(const std::string& prompt, int limit, const Piece& piece);
  void forget() {
    runner->reset();
    position = 0;
    next = opening;
  }
  void end() {
    const std::lock_guard<std::mutex> lock(mutex);
    busy = false;
    if (closed) runner.reset();
  }
};

namespace {

// Holds the model for one call; a second call at once is refused.
template <class State>
class Turn {
 public:
  explicit Turn(State& state) : state_(state) {
    const std::lock_guard<std::mutex> lock(state.mutex);
    if (state.closed) throw Refused(Reason::closed, "The chat was closed; make a new one.");
    if (state.busy) {
      throw Refused(Reason::busy, "An answer is being written; wait for it, or stop it first.");
    }
    state.busy = true;
    state.stop = false;
  }
  ~Turn() { state_.end(); }

 private:
  State& state_;
};

}  // namespace

void Chat::State::load(const std::string& directory) {
  const std::uint64_t needed =
      bundle.memory_bytes + (settings.mapped ? 0 : bundle.program.size_bytes);
  const std::uint64_t room =
      settings.available_bytes ? settings.available_bytes : available_bytes();
  if (room && room < needed) {
    throw Refused(Reason::too_little_memory,
                  "The model takes " + std::to_string(needed) + " bytes of memory and " +
                      std::to_string(room) + " are free; close other apps or use a smaller model.");
  }
  settings.progress("loading", 0);
  auto read = llm::load_tokenizer(
      directory + "/" + bundle.tokenizer.name, nullptr, std::nullopt, 0, 1);
  if (!read) {
    throw Refused(Reason::cannot_load, "ExecuTorch cannot read " + bundle.tokenizer.name +
                                           "; use another model.");
  }
  tokenizer = read.get();
  if (settings.weights_cache) {
    runtime::BackendOptions<1> options;
    if (options.set_option("weight_cache_enabled", *settings.weights_cache) != runtime::Error::Ok ||
        runtime::set_option("XnnpackBackend", options.view()) != runtime::Error::Ok) {
      throw Refused(Reason::bad_setting, "This ExecuTorch has no XNNPACK, or no weights cache.");
    }
  }
  runner = llm::create_text_llm_runner(
      directory + "/" + bundle.program.name, std::move(read), std::nullopt, -1.0f, "forward",
      settings.mapped ? LoadMode::Mmap : LoadMode::File);
  if (!runner || runner->load() != runtime::Error::Ok) {
    throw Refused(Reason::cannot_load, "ExecuTorch cannot load " + bundle.program.name +
                                           "; build the app with release " + bundle.executorch +
                                           ", its XNNPACK, quantized and LLM kernels.");
  }
  settings.progress("loading", 1);
}

void Chat::State::check_answers() {
  for (std::size_t i = 0; i < bundle.checks.size(); ++i) {
    const Check& check = bundle.checks[i];
    std::string answer;
    forget();
    generate(check.prompt, check.tokens, [&](std::string_view piece) { answer += piece; });
    if (answer != check.answer) {
      throw Refused(Reason::wrong_answer,
                    "The model does not answer as its maker recorded; build the app with "
                    "ExecuTorch " + bundle.executorch + ", or report this device.");
    }
    settings.progress("checking", double(i + 1) / double(bundle.checks.size()));
  }
}

void Chat::State::refuse_special(const std::string& text) const {
  for (const std::string& token : bundle.special) {
    if (text.find(token) != std::string::npos) {
      throw Refused(Reason::special_text, "The text spells " + token + ", which the model reads "
                                          "as an instruction; leave it out.");
    }
  }
}

// Reads `prompt` and writes at most `limit` tokens. One token more than is shown is made, and
// dropped: the runner never reads its last token, so what is shown is what the KV cache holds.
Result Chat::State::generate(const std::string& prompt, int limit, const Piece& piece) {
  auto ids = tokenizer->encode(prompt, 0, 0);
  if (!ids.ok()) {
    throw Refused(Reason::unreadable_text, "The text cannot be read; write it in UTF-8.");
  }
  const auto size = static_cast<int>(ids.get().size());
  const int room = bundle.context - position - size;  // positions left for an answer
  if (room < 1) return Result::context_full;
  llm::GenerationConfig config;
  config.echo = false;
  config.temperature = settings.temperature;
  config.max_new_tokens = std::min(limit + 1, room);  // without end where one more never comes
  config.warming = true;  // else the runner prints each piece on standard output

  int tokens = 0;
  std::string bytes, end, end_read;
  std::optional<Result> result;
  std::exception_ptr thrown;
  const auto error = runner->generate(prompt, config, [&](const std::string& text) {
    ++tokens;
    if (result) {
      end_read = end;  // it was the first token, which the runner takes for no end
      return runner->stop();
    }
    if (std::find(bundle.ends.begin(), bundle.ends.end(), text) != bundle.ends.end()) {
      result = Result::ended;
      end = text;
      return;
    }
    bytes += text;
    try {
      if (const std::string whole = characters(bytes); !whole.empty()) piece(whole);
    } catch (...) {
      thrown = std::current_exception();
    }
    if (stop || thrown) {
      result = Result::stopped;
    } else if (tokens == limit) {
      result = Result::limit;
    }
  }, {});
  if (error != runtime::Error::Ok) {
    forget();
    throw Refused(Reason::failed, "ExecuTorch failed (error " +
                                      std::to_string(static_cast<int>(error)) +
                                      "); the conversation begins anew.");
  }
  position += size + tokens - 1;
  next = bundle.assistant.after;
  if (next.compare(0, end_read.size(), end_read) == 0) next.erase(0, end_read.size());
  if (thrown) std::rethrow_exception(thrown);
  return result.value_or(Result::context_full);
}

Chat::Chat(const Bundle& bundle, const std::string& directory, Settings settings) {
  silence();
  if (!settings.progress) settings.progress = [](std::string_view, double) {};
  if (settings.limit < 1 || !(settings.temperature >= 0 && settings.temperature <= 1)) {
    throw Refused(Reason::bad_setting, "limit is at least 1, and temperature from 0 to 1.");
  }
  const std::string mark = bundle.program.sha256 + bundle.tokenizer.sha256;
  std::string marked;
  std::ifstream(settings.mark) >> marked;
  state_.reset(new State{bundle, std::move(settings)});
  State& state = *state_;
  if (!state.settings.system.empty() && !bundle.system) {
    throw Refused(Reason::no_system_prompt, "The model knows no system prompt; leave it out.");
  }
  state.refuse_special(state.settings.system);
  const auto text = [&](const std::string& it) { return bundle.strip ? stripped(it) : it; };
  state.opening = state.settings.system.empty()
      ? bundle.begin
      : bundle.system->before + std::string(text(state.settings.system)) + bundle.system->after;
  if (marked != mark) {
    for (const File& file : {bundle.program, bundle.tokenizer}) {
      check_file(directory + "/" + file.name, file, state.settings.progress);
    }
  }
  state.load(directory);
  if (marked != mark) {
    state.check_answers();
    if (!state.settings.mark.empty()) std::ofstream(state.settings.mark) << mark;
  }
  state.forget();
}

Chat::~Chat() = default;

Result Chat::say(const std::string& text, const Piece& piece) {
  const Turn<State> turn(*state_);
  State& state = *state_;
  const Bundle& bundle = state.bundle;
  state.refuse_special(text);
  const std::string_view asked = bundle.strip ? stripped(text) : std::string_view(text);
  std::string prompt = state.next + bundle.user.before;
  prompt.append(asked).append(bundle.user.after).append(bundle.answer);
  return state.generate(prompt, state.settings.limit, piece);
}

void Chat::stop() { state_->stop = true; }

void Chat::reset() {
  const Turn<State> turn(*state_);
  state_->forget();
}

void Chat::close() {
  state_->stop = true;
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->closed = true;
  if (!state_->busy) state_->runner.reset();
}

}  // namespace cloister
