// ExecuTorch's stock runner: `stock PROGRAM TOKENIZER mapped|file on|off OUT [COUNT PROMPT]...`.
// Answers of at most COUNT tokens go to the file OUT, a zero byte after each.
#include <fstream>

#include <executorch/runtime/backend/interface.h>

#include "wheel.h"

int main(int count, char** values) {
  namespace llm = executorch::extension::llm;
  namespace runtime = executorch::runtime;
  using LoadMode = executorch::extension::Module::LoadMode;

  runtime::BackendOptions<1> options;
  const bool set =
      options.set_option("weight_cache_enabled", std::string(values[4]) == "on") ==
          runtime::Error::Ok &&
      runtime::set_option("XnnpackBackend", options.view()) == runtime::Error::Ok;
  auto tokenizer = llm::load_tokenizer(values[2], nullptr, std::nullopt, 0, 1);
  // File: ExecuTorch's FileDataLoader, which frees what it read.
  const auto runner = llm::create_text_llm_runner(
      values[1], std::move(tokenizer), std::nullopt, -1.0f, "forward",
      std::string(values[3]) == "mapped" ? LoadMode::Mmap : LoadMode::File);
  if (!set || !runner) return 2;
  std::ofstream out(values[5], std::ios::binary);
  for (int i = 6; i + 1 < count; i += 2) {
    std::string answer;
    llm::GenerationConfig config;
    config.echo = false;
    config.temperature = 0;
    config.max_new_tokens = std::stoi(values[i]);
    runner->reset();
    const auto error = runner->generate(
        values[i + 1], config, [&](const std::string& piece) { answer += piece; }, {});
    if (error != runtime::Error::Ok) return 3;
    out << answer << '\0';
  }
}
