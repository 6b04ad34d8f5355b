// The operators as ExecuTorch calls them (`ops.py` has their schemas).
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <string>
#include <type_traits>

#include "profile.h"
#include "run.h"

#if defined(ET_USE_THREADPOOL)
namespace executorch::extension::threadpool {
// Its header needs pthreadpool's, which ExecuTorch's wheel lacks.
class ThreadPool {
 public:
  size_t get_thread_count() const;
};
ThreadPool *get_threadpool();
}  // namespace executorch::extension::threadpool
#endif

namespace cloister {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::resize_tensor;
using OptionalTensor = executorch::aten::optional<Tensor>;

int64_t threads() {
#if defined(ET_USE_THREADPOOL)
  auto *pool = executorch::extension::threadpool::get_threadpool();
  return pool == nullptr ? 1 : int64_t(pool->get_thread_count());
#else
  return 1;
#endif
}

// ExecuTorch gives each thread its share beforehand; here each takes the next task, so that none
// waits for one that started late or is slow.
void spread(void (*work)(void *context, int64_t task), void *context, int64_t tasks) {
  std::atomic<int64_t> next{0};
  executorch::extension::parallel_for(0, std::min(tasks, threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next++) < tasks;) work(context, task);
  });
}

const Kernels &chosen() {
  static const Kernels *const set = kernels(std::getenv("CLOISTER_KERNELS"));
  static const Kernels &found = set == nullptr ? *kernels() : *set;
  return found;
}

#define REQUIRE(condition, result)                         \
  if (!(condition)) {                                      \
    ET_LOG(Error, "%s: not so: %s", __func__, #condition); \
    ctx.fail(Error::InvalidArgument);                      \
    return result;                                         \
  }

// Whether the entries lie one after the other, the last dimension's side by side.
bool dense(const Tensor &x) {
  const auto order = x.dim_order();
  for (size_t i = 0; order.data() != nullptr && i < order.size(); ++i)
    if (order[i] != i) return false;
  return x.numel() == 0 || x.const_data_ptr() != nullptr;
}

bool floats(const Tensor &x, int64_t count) {
  return x.scalar_type() == ScalarType::Float && int64_t(x.numel()) == count && dense(x);
}

// Whether `weights` are whole tiles of `outputs` rows.
bool holds(const Tensor &weights, int64_t format, int64_t outputs, int64_t inputs) {
  if (outputs <= 0 || outputs > INT_MAX || inputs <= 0 || inputs > INT_MAX) return false;
  const int64_t bytes = tile_bytes(format, inputs), tiles = (outputs + kTile - 1) / kTile;
  return bytes > 0 && int64_t(weights.nbytes()) == tiles * bytes && dense(weights);
}

const float *floats_of(const OptionalTensor &x) {
  return x.has_value() ? x->const_data_ptr<float>() : nullptr;
}

bool floats(const OptionalTensor &x, int64_t count) { return !x.has_value() || floats(*x, count); }

Tensor &linear_out(KernelRuntimeContext &ctx, const Tensor &x, const Tensor &weights,
                   int64_t format, int64_t outputs, int64_t input, const OptionalTensor &norm,
                   double eps, const OptionalTensor &bias, const OptionalTensor &residual,
                   bool whole, Tensor &out) {
  const Timer timer(kLinear + input);
  REQUIRE(x.dim() >= 1 && x.scalar_type() == ScalarType::Float, out);
  REQUIRE(input >= kPlain && input <= kGatedGelu && dense(x), out);
  const int64_t last = x.size(x.dim() - 1), times = input >= kGatedSilu ? 2 : 1;
  REQUIRE(last > 0 && last % times == 0, out);
  const int64_t inputs = last / times, rows = x.numel() / last;
  REQUIRE(holds(weights, format, outputs, inputs), out);
  REQUIRE(floats(norm, inputs) && (input == kNormed) == norm.has_value(), out);
  REQUIRE(floats(bias, outputs) && floats(residual, rows * outputs), out);
  executorch::aten::SizesType sizes[16];
  REQUIRE(x.dim() <= 16, out);
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  sizes[x.dim() - 1] = executorch::aten::SizesType(outputs);
  REQUIRE(resize_tensor(out, {sizes, size_t(x.dim())}) == Error::Ok && floats(out, rows * outputs),
          out);
  Linear work = {};
  work.x = x.const_data_ptr<float>();
  work.rows = rows;
  work.inputs = inputs;
  work.input = input;
  work.norm = floats_of(norm);
  work.eps = float(eps);
  work.whole = whole;
  work.weights = static_cast<const uint8_t *>(weights.const_data_ptr());
  work.format = format;
  work.outputs = outputs;
  work.bias = floats_of(bias);
  work.residual = floats_of(residual);
  work.out = out.mutable_data_ptr<float>();
  linear(chosen(), work, spread, threads());
  return out;
}

Tensor &attention_out(KernelRuntimeContext &ctx, const Tensor &qkv, Tensor &k_cache,
                      Tensor &v_cache, int64_t start, const OptionalTensor &cos,
                      const OptionalTensor &sin, const OptionalTensor &q_norm,
                      const OptionalTensor &k_norm, int64_t heads, double eps, double scale,
                      double softcap, int64_t window, Tensor &out) {
  const Timer timer(kAttention);
  REQUIRE(k_cache.dim() == 4 && k_cache.size(0) == 1 && qkv.dim() == 3 && qkv.size(0) == 1, out);
  const ScalarType type = k_cache.scalar_type();
  const bool bytes = type == ScalarType::Char;
  REQUIRE(bytes || type == ScalarType::Half || type == ScalarType::Float, out);
  const int64_t cache = bytes ? kInt8 : type == ScalarType::Half ? kFloat16 : kFloat32;
  const int64_t context = k_cache.size(1), kv_heads = k_cache.size(2), length = qkv.size(1);
  const int64_t size = k_cache.size(3) - (bytes ? 4 : 0);
  REQUIRE(v_cache.dim() == 4 && v_cache.numel() == k_cache.numel(), out);
  REQUIRE(v_cache.scalar_type() == type && dense(k_cache) && dense(v_cache), out);
  REQUIRE(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && size > 0 && size % 16 == 0, out);
  REQUIRE(heads <= qkv.size(2) && qkv.size(2) == (heads + 2 * kv_heads) * size, out);
  REQUIRE(floats(qkv, length * qkv.size(2)), out);
  REQUIRE(start >= 0 && length > 0 && start <= context - length && window >= 0, out);
  REQUIRE(floats(cos, context * size) && floats(sin, context * size), out);
  REQUIRE(cos.has_value() == sin.has_value(), out);
  REQUIRE(floats(q_norm, size) && floats(k_norm, size), out);
  const executorch::aten::SizesType sizes[] = {1, int32_t(length), int32_t(heads * size)};
  REQUIRE(resize_tensor(out, {sizes, 3}) == Error::Ok && floats(out, length * heads * size), out);
  Attention work = {};
  work.qkv = qkv.const_data_ptr<float>();
  work.length = length;
  work.start = start;
  work.heads = heads;
  work.kv_heads = kv_heads;
  work.size = size;
  work.cos = floats_of(cos);
  work.sin = floats_of(sin);
  work.q_norm = floats_of(q_norm);
  work.k_norm = floats_of(k_norm);
  work.eps = float(eps);
  work.scale = float(scale);
  work.softcap = float(softcap);
  work.window = window;
  work.cache = cache;
  work.k = k_cache.mutable_data_ptr();
  work.v = v_cache.mutable_data_ptr();
  work.out = out.mutable_data_ptr<float>();
  attention(chosen(), work, spread, threads());
  return out;
}

Tensor &embedding_out(KernelRuntimeContext &ctx, const Tensor &tokens, const Tensor &weights,
                      int64_t format, int64_t rows, int64_t size, Tensor &out) {
  const Timer timer(kEmbedding);
  REQUIRE(tokens.scalar_type() == ScalarType::Long && tokens.dim() == 2 && dense(tokens), out);
  REQUIRE(holds(weights, format, rows, size), out);
  const int64_t bytes = tile_bytes(format, size);
  const executorch::aten::SizesType sizes[] = {executorch::aten::SizesType(tokens.size(0)),
                                               executorch::aten::SizesType(tokens.size(1)),
                                               executorch::aten::SizesType(size)};
  REQUIRE(resize_tensor(out, {sizes, 3}) == Error::Ok && floats(out, tokens.numel() * size), out);
  const int64_t *ids = tokens.const_data_ptr<int64_t>();
  const uint8_t *data = static_cast<const uint8_t *>(weights.const_data_ptr());
  for (int64_t i = 0; i < int64_t(tokens.numel()); ++i) {
    REQUIRE(ids[i] >= 0 && ids[i] < rows, out);
    chosen().unpack(format, data + ids[i] / kTile * bytes, size, ids[i] % kTile,
                    out.mutable_data_ptr<float>() + i * size);
  }
  return out;
}

Tensor &norm_out(KernelRuntimeContext &ctx, const Tensor &x, const Tensor &weight, double eps,
                 const OptionalTensor &residual, Tensor &out) {
  const Timer timer(kNorm);
  REQUIRE(x.dim() >= 1 && x.scalar_type() == ScalarType::Float && dense(x), out);
  const int64_t size = x.size(x.dim() - 1);
  REQUIRE(size > 0 && floats(weight, size) && floats(residual, x.numel()), out);
  REQUIRE(resize_tensor(out, x.sizes()) == Error::Ok && floats(out, x.numel()), out);
  const float *from = x.const_data_ptr<float>(), *more = floats_of(residual);
  float *to = out.mutable_data_ptr<float>();
  for (int64_t at = 0; at < int64_t(x.numel()); at += size) {
    chosen().norm(from + at, weight.const_data_ptr<float>(), float(eps), size, to + at);
    if (more != nullptr)
      for (int64_t i = at; i < at + size; ++i) to[i] += more[i];
  }
  return out;
}

using executorch::runtime::EValue;
using Values = executorch::runtime::Span<EValue *>;

template <typename T>
bool is(const EValue &value) {
  if constexpr (std::is_same_v<T, Tensor>) return value.isTensor();
  if constexpr (std::is_same_v<T, OptionalTensor>) return value.isNone() || value.isTensor();
  if constexpr (std::is_same_v<T, int64_t>) return value.isInt();
  if constexpr (std::is_same_v<T, double>) return value.isDouble();
  if constexpr (std::is_same_v<T, bool>) return value.isBool();
}

template <typename... T>
bool are(Tensor &(*)(KernelRuntimeContext &, T...), Values values) {
  size_t i = 0;
  return values.size() >= sizeof...(T) && (is<std::decay_t<T>>(*values[i++]) && ...);
}

// An operator as ExecuTorch calls it. Values of other types are refused here: unboxing them would
// end the process.
template <auto function, typename Wrapped>
void checked(KernelRuntimeContext &ctx, Values values) {
  REQUIRE(are(function, values), );
  executorch::extension::WrapUnboxedIntoFunctor<Wrapped>::call(ctx, values);
}

}  // namespace
}  // namespace cloister

extern "C" {

// The instruction set in use, and those that this processor runs, best first.
__attribute__((visibility("default"))) const char *cloister_chosen() {
  return cloister::chosen().name;
}

__attribute__((visibility("default"))) const char *cloister_sets() {
  static const std::string all = [] {
    std::string names;
    for (const char *each : {"avx512", "avxvnni", "avx2", "i8mm", "neon", "portable"})
      if (cloister::kernels(each) != nullptr) names += std::string(each) + " ";
    return names;
  }();
  return all.c_str();
}

// Begin to time calls, or stop; those timed before are forgotten.
__attribute__((visibility("default"))) void cloister_profile(bool on) {
  cloister::profile.calls.clear();
  cloister::profile.on = on;
}

// Copy at most `most` of the timed calls, the first ones, and return how many there are.
__attribute__((visibility("default"))) int64_t cloister_profiled(cloister::Call *out,
                                                                 int64_t most) {
  const auto &calls = cloister::profile.calls;
  std::copy_n(calls.begin(), std::min<size_t>(calls.size(), size_t(most)), out);
  return int64_t(calls.size());
}
}

// As EXECUTORCH_LIBRARY does, but a process that has the operators already keeps those.
#define OPERATOR(name, function)                                                               \
  static constexpr char function##_name[] = name;                                              \
  static const bool function##_known =                                                         \
      executorch::runtime::registry_has_op_function(name) ||                                   \
      executorch::runtime::register_kernel(executorch::runtime::Kernel(                        \
          name,                                                                                \
          cloister::checked<cloister::function,                                                \
                            decltype(EXECUTORCH_FN(cloister::function, function##_name))>)) == \
          executorch::runtime::Error::Ok

OPERATOR("cloister::linear.out", linear_out);
OPERATOR("cloister::attention.out", attention_out);
OPERATOR("cloister::embedding.out", embedding_out);
OPERATOR("cloister::norm.out", norm_out);
