// Reads a prompt and decodes greedily: what an app's process does, and nothing beside it.
//
//     step PROGRAM CHUNK TOKENS ID...
//
// Built against the headers of ExecuTorch's wheel, linked to its libraries. The prompt is read at
// most CHUNK tokens a call. TOKENS ids are printed, however the answer ends.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <vector>

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

namespace executorch::extension::threadpool {  // whose header wants another that is not there

class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();

}  // namespace executorch::extension::threadpool

using namespace executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace {

class Loader final : public DataLoader {
 public:
  explicit Loader(const char* path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    size_ = static_cast<size_t>(file.tellg());
    data_ = static_cast<char*>(std::aligned_alloc(4096, (size_ + 4095) / 4096 * 4096));
    file.seekg(0).read(data_, static_cast<std::streamsize>(size_));
  }

  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    return FreeableBuffer(data_ + offset, size, nullptr);
  }

  Result<size_t> size() const override { return size_; }

 private:
  size_t size_;
  char* data_;
};

class Allocator final : public MemoryAllocator {
 public:
  Allocator() : MemoryAllocator(0, nullptr) {}
  void* allocate(size_t size, size_t alignment) override {
    alignment = alignment < 16 ? 16 : alignment;
    return std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  }
};

int32_t best(Method& method, std::vector<int64_t> tokens, int64_t start) {
  TensorImpl::SizesType sizes[] = {1, static_cast<TensorImpl::SizesType>(tokens.size())}, one[] = {1};
  TensorImpl::DimOrderType order[] = {0, 1};
  TensorImpl::StridesType strides[] = {sizes[1], 1};
  TensorImpl ids(ScalarType::Long, 2, sizes, tokens.data(), order, strides);
  TensorImpl position(ScalarType::Long, 1, one, &start, order, strides + 1);
  const auto failed = [](Error error) {
    std::fprintf(stderr, "the runtime failed: %u\n", static_cast<unsigned>(error));
    std::exit(1);
  };
  for (Error error : {method.set_input(EValue(Tensor(&ids)), 0),
                      method.set_input(EValue(Tensor(&position)), 1), method.execute()}) {
    if (error != Error::Ok) failed(error);
  }
  const Tensor& logits = method.get_output(0).toTensor();
  const float* row = logits.const_data_ptr<float>();
  int32_t found = 0;
  for (int32_t id = 1; id < logits.numel(); ++id) {
    if (row[id] > row[found]) found = id;
  }
  return found;
}

}  // namespace

int main(int count, char** given) {
  std::setvbuf(stdout, nullptr, _IONBF, 0);  // an id is a call of write, at which others count
  runtime_init();
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(1);  // none waits
  Loader loader(given[1]);
  const size_t chunk = std::strtoul(given[2], nullptr, 10);
  const int tokens = std::atoi(given[3]);
  std::vector<int64_t> prompt;
  for (int each = 4; each < count; ++each) prompt.push_back(std::atoll(given[each]));

  Result<Program> program = Program::load(&loader);
  const auto meta = program->method_meta("forward");
  std::vector<std::unique_ptr<uint8_t[]>> buffers;
  std::vector<Span<uint8_t>> spans;
  for (size_t each = 0; each < meta->num_memory_planned_buffers(); ++each) {
    const auto size = static_cast<size_t>(*meta->memory_planned_buffer_size(each));
    buffers.push_back(std::make_unique<uint8_t[]>(size));
    spans.emplace_back(buffers.back().get(), size);
  }
  HierarchicalAllocator planned({spans.data(), spans.size()});
  Allocator allocator, temporary;
  MemoryManager memory(&allocator, &planned, &temporary);
  Result<Method> method = program->load_method("forward", &memory);
  if (!method.ok()) return std::fprintf(stderr, "cannot be loaded\n"), 1;

  int32_t next = 0;
  size_t read = 0;
  while (read < prompt.size()) {
    const size_t end = std::min(read + chunk, prompt.size());
    next = best(*method, {prompt.begin() + read, prompt.begin() + end}, read);
    read = end;
  }
  for (int each = 0; each < tokens; ++each) {
    std::printf("%d\n", next);
    if (each + 1 < tokens) next = best(*method, {next}, static_cast<int64_t>(read++));
  }
  std::_Exit(0);  // what the libraries do at the end is not counted
}
