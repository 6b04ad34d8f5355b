// What the PyPI wheel of executorch 1.4.1 exports but has no headers of. Only a build against the
// wheel uses this; order and types are those of 1.4.1, so no other release fits.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <executorch/runtime/core/error.h>

namespace tokenizers {

template <class T>
class Result {
 public:
  Result(Result&&) = delete;
  ~Result() { if (has_value_) value_.~T(); }
  bool ok() const { return has_value_; }
  T& get() { return value_; }

 private:
  union { T value_; std::uint32_t error_; };
  const bool has_value_;
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = 0;
  virtual std::uint32_t load(const std::string&) = 0;
  virtual Result<std::string> id_to_piece(std::uint64_t) const = 0;
  virtual Result<std::uint64_t> piece_to_id(const std::string&) const = 0;
  virtual Result<std::vector<std::uint64_t>> encode(
      const std::string&, std::int8_t bos, std::int8_t eos) const = 0;
};

}  // namespace tokenizers

namespace executorch::extension {

namespace module {
class Module {
 public:
  enum class LoadMode { File, Mmap, MmapUseMlock, MmapUseMlockIgnoreErrors, MmapUseMadvise };
};
}  // namespace module
using module::Module;

namespace llm {

struct Stats;
class MultimodalInput;

struct GenerationConfig {
  bool echo = true;
  std::string grammar, grammar_type;
  bool ignore_eos = false;
  std::int32_t max_new_tokens = -1;
  bool warming = false;
  std::int32_t seq_len = -1;
  float temperature = 0.8f;
  std::int32_t num_bos = 0, num_eos = 0;
};

class TextLLMRunner {
 public:
  virtual ~TextLLMRunner() = 0;
  virtual bool is_loaded() const = 0;
  virtual runtime::Error load() = 0;
  virtual runtime::Error generate(
      const std::string&, const GenerationConfig&, std::function<void(const std::string&)>,
      std::function<void(const Stats&)>) = 0;
  virtual void prefill(const std::vector<MultimodalInput>&, std::int32_t, std::int32_t) = 0;
  virtual void stop() = 0;
  virtual void reset() = 0;
};

std::unique_ptr<tokenizers::Tokenizer> load_tokenizer(
    const std::string&, std::unique_ptr<std::vector<std::string>>, std::optional<std::string>,
    std::size_t, std::size_t);
std::unique_ptr<TextLLMRunner> create_text_llm_runner(
    const std::string&, std::unique_ptr<tokenizers::Tokenizer>, std::optional<const std::string>,
    float, const std::string&, Module::LoadMode);

}  // namespace llm
}  // namespace executorch::extension
