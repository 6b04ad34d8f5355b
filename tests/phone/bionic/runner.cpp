// Asks ExecuTorch's stock runner out of Android's library: runner PROGRAM TOKENIZER file|mapped
//
// Standard input has a limit of tokens and a prompt, each ended by a zero byte, and so on; standard
// output gets every answer, ended by a zero byte. Each is a conversation of its own.
//
// npm's package has the library and no headers of the runner. What is declared here is what the
// library's symbols say; the members of GenerationConfig are those of release 1.2.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <unistd.h>

namespace tokenizers {
struct Tokenizer {
  virtual ~Tokenizer() = default;
};
}  // namespace tokenizers

namespace executorch {
namespace runtime {
enum class Error : uint32_t { Ok = 0 };
}
namespace extension {
namespace module {
struct Module {
  enum class LoadMode { File, Mmap, MmapUseMlock, MmapUseMlockIgnoreErrors };
};
}  // namespace module
namespace llm {
struct Stats;
struct GenerationConfig {
  bool echo = false;
  bool ignore_eos = false;
  int32_t max_new_tokens = -1;
  bool warming = false;
  int32_t seq_len = -1;
  float temperature = 0;
  int32_t num_bos = 0;
  int32_t num_eos = 0;
};
struct TextLLMRunner {
  ~TextLLMRunner();
  void reset();
  runtime::Error generate(const std::string&, const GenerationConfig&,
                          std::function<void(const std::string&)>,
                          std::function<void(const Stats&)>);
};
std::unique_ptr<tokenizers::Tokenizer> load_tokenizer(
    const std::string&, std::unique_ptr<std::vector<std::string>>, std::optional<std::string>,
    size_t, size_t);
std::unique_ptr<TextLLMRunner> create_text_llm_runner(
    const std::string&, std::unique_ptr<tokenizers::Tokenizer>, std::optional<const std::string>,
    float, const std::string&, module::Module::LoadMode);
}  // namespace llm
}  // namespace extension
}  // namespace executorch

// The one name of libc++ that the library has not.
void std::__libcpp_verbose_abort(const char*, ...) { abort(); }

int main(int, char** given) {
  using namespace executorch::extension;
  using Mode = module::Module::LoadMode;
  FILE* answers = fdopen(dup(1), "w");
  dup2(2, 1);  // the runner itself prints what it says, and more
  const Mode mode = std::string(given[3]) == "file" ? Mode::File : Mode::MmapUseMlockIgnoreErrors;
  auto* runner = llm::create_text_llm_runner(
      given[1], llm::load_tokenizer(given[2], nullptr, std::nullopt, 0, 0), std::nullopt, -1,
      "forward", mode).release();
  if (!runner) {
    return 2;
  }
  char *limit = nullptr, *prompt = nullptr;
  size_t limit_size = 0, prompt_size = 0;
  while (getdelim(&limit, &limit_size, 0, stdin) > 0 &&
         getdelim(&prompt, &prompt_size, 0, stdin) > 0) {
    llm::GenerationConfig config;
    config.max_new_tokens = atoi(limit);
    const auto print = [&](const std::string& piece) { fputs(piece.c_str(), answers); };
    if (runner->generate(prompt, config, print, {}) != executorch::runtime::Error::Ok) {
      return 3;
    }
    fputc(0, answers);
    fflush(answers);
    runner->reset();
  }
  _Exit(0);
}
