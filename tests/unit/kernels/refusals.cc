// The operators as ExecuTorch calls them, with arguments that fit and with some of them changed.
//
// usage: refusals SEED CASES; prints how many calls of each operator were answered and refused.
// Every buffer is as long as its tensor says, so that AddressSanitizer sees what is read beyond it.
// Ends with 1 where an unchanged call is refused, or its numbers are none.
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "run.h"

using namespace executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace {

std::mt19937 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

template <typename T>
T one_of(const std::vector<T> &all) {
  return all[size_t(pick(0, int64_t(all.size()) - 1))];
}

// A tensor with memory of its own.
struct Held {
  std::vector<int32_t> sizes, strides;
  std::vector<uint8_t> order;
  ScalarType type;
  std::unique_ptr<char[]> data;
  std::unique_ptr<TensorImpl> impl;

  int64_t count() const {
    int64_t all = 1;
    for (const int32_t each : sizes) all *= each;
    return all;
  }

  void make(bool with_data = true) {
    strides.assign(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;)
      strides[order[i - 1]] = strides[order[i]] * std::max(1, sizes[order[i]]);
    const size_t bytes = size_t(count()) * elementSize(type);
    data.reset(with_data ? new char[bytes] : nullptr);
    if (data) fill(bytes);
    impl = std::make_unique<TensorImpl>(type, ssize_t(sizes.size()), sizes.data(), data.get(),
                                        order.data(), strides.data(),
                                        TensorShapeDynamism::DYNAMIC_BOUND);
  }

  void fill(size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) data[i] = char(pick(0, 255));
    if (type == ScalarType::Float)
      for (size_t i = 0; i < bytes / 4; ++i) {
        const float x = float(pick(-1000, 1000)) * 1e-3f;
        std::memcpy(&data[4 * i], &x, 4);
      }
    // Any halves, and any scales behind the heads of a cache, may be no numbers.
    if (type == ScalarType::Half || type == ScalarType::Char) std::memset(data.get(), 0, bytes);
    if (type == ScalarType::Long)
      for (size_t i = 0; i < bytes / 8; ++i) {
        const int64_t token = pick(0, 9);
        std::memcpy(&data[8 * i], &token, 8);
      }
  }
};

// The arguments of a call.
struct Call {
  std::vector<std::unique_ptr<Held>> tensors;  // by argument; null for other values
  std::vector<EValue> values;

  Held *tensor(std::vector<int32_t> sizes, ScalarType type = ScalarType::Float) {
    auto held = std::make_unique<Held>();
    held->sizes = std::move(sizes);
    for (size_t i = 0; i < held->sizes.size(); ++i) held->order.push_back(uint8_t(i));
    held->type = type;
    held->make();
    values.emplace_back(Tensor(held->impl.get()));
    tensors.push_back(std::move(held));
    return tensors.back().get();
  }

  template <typename T>
  void value(T x) {
    values.emplace_back(x);
    tensors.push_back(nullptr);
  }

  void none() {
    values.emplace_back();
    tensors.push_back(nullptr);
  }

  void maybe(std::vector<int32_t> sizes) {
    if (pick(0, 1))
      tensor(std::move(sizes));
    else
      none();
  }
};

// Tiles whose bytes are any, but whose scales are small: see `trial.cc`. Zeros here.
void weights(Call &call, int64_t format, int64_t outputs, int64_t inputs) {
  const int64_t tiles = (outputs + cloister::kTile - 1) / cloister::kTile;
  const int64_t bytes = tiles * cloister::tile_bytes(format, inputs);
  Held *held = call.tensor({int32_t(bytes)}, ScalarType::Byte);
  std::memset(held->data.get(), 0, size_t(bytes));
}

int64_t inputs_of(int64_t format) {
  const bool wide = format == cloister::kQ4_K || format == cloister::kQ6_K;
  return format == cloister::kW8 ? pick(1, 100) : (wide ? 256 : 32) * pick(1, 3);
}

void linear(Call &call) {
  const int64_t format = pick(0, cloister::kFormats - 1), inputs = inputs_of(format);
  const int32_t rows = int32_t(pick(1, 9)), outputs = int32_t(pick(1, 40));
  const int64_t input = pick(0, 3);
  call.tensor({1, rows, int32_t(inputs * (input >= 2 ? 2 : 1))});
  weights(call, format, outputs, inputs);
  call.value<int64_t>(format);
  call.value<int64_t>(outputs);
  call.value<int64_t>(input);
  if (input == 1)
    call.tensor({int32_t(inputs)});
  else
    call.none();
  call.value(1e-6);
  call.maybe({outputs});
  call.maybe({1, rows, outputs});
  call.value(pick(0, 1) == 1);
  call.tensor({1, rows, outputs});
}

void attention(Call &call) {
  const int32_t kv_heads = int32_t(pick(1, 3)), heads = kv_heads * int32_t(pick(1, 3));
  const int32_t size = 16 * int32_t(pick(1, 4)), context = int32_t(pick(1, 60));
  const int32_t length = int32_t(pick(1, context)), start = int32_t(pick(0, context - length));
  const ScalarType type =
      one_of<ScalarType>({ScalarType::Float, ScalarType::Half, ScalarType::Char});
  call.tensor({1, length, (heads + 2 * kv_heads) * size});
  const int32_t head = size + (type == ScalarType::Char ? 4 : 0);  // with its scale
  call.tensor({1, context, kv_heads, head}, type);
  call.tensor({1, context, kv_heads, head}, type);
  call.value<int64_t>(start);
  const bool turned = pick(0, 1) == 1;
  for (int i = 0; i < 2; ++i)
    if (turned)
      call.tensor({context, size});
    else
      call.none();
  call.maybe({size});
  call.maybe({size});
  call.value<int64_t>(heads);
  call.value(1e-6);
  call.value(1 / std::sqrt(double(size)));
  call.value(pick(0, 1) ? 0.0 : 20.0);
  call.value<int64_t>(pick(0, context));
  call.tensor({1, length, heads * size});
}

void embedding(Call &call) {
  const int64_t format = pick(0, cloister::kFormats - 1), size = inputs_of(format);
  const int32_t length = int32_t(pick(1, 9));
  const int64_t rows = pick(10, 40);
  call.tensor({1, length}, ScalarType::Long);
  weights(call, format, rows, size);
  call.value<int64_t>(format);
  call.value<int64_t>(rows);
  call.value<int64_t>(size);
  call.tensor({1, length, int32_t(size)});
}

void norm(Call &call) {
  const int32_t rows = int32_t(pick(1, 9)), size = int32_t(pick(1, 100));
  call.tensor({1, rows, size});
  call.tensor({size});
  call.value(1e-6);
  call.maybe({1, rows, size});
  call.tensor({1, rows, size});
}

void change_tensor(Held &held, EValue &value) {
  bool with_data = true;
  switch (pick(0, 7)) {
    case 7:  // any bits: numbers that are none, tokens that there are not
      for (size_t i = 0; held.data && i < held.impl->nbytes(); ++i)
        held.data[i] = char(pick(0, 255));
      return;
    case 0:
      held.type = one_of<ScalarType>({ScalarType::Float, ScalarType::Half, ScalarType::Char,
                                      ScalarType::Byte, ScalarType::Long, ScalarType::Double});
      break;
    case 1:
      if (!held.sizes.empty()) {
        int32_t &size = held.sizes[size_t(pick(0, int64_t(held.sizes.size()) - 1))];
        size = std::max<int32_t>(0, one_of<int32_t>({0, 1, size - 1, size + 1, 2 * size, 17}));
      }
      break;
    case 2:
      held.sizes.push_back(int32_t(pick(0, 3)));
      held.order.push_back(uint8_t(held.order.size()));
      break;
    case 3:
      if (!held.sizes.empty()) held.sizes.pop_back(), held.order.pop_back();
      std::sort(held.order.begin(), held.order.end());
      break;
    case 4:
      std::shuffle(held.order.begin(), held.order.end(), rng);
      break;
    case 5:
      with_data = false;
      break;
    default:
      std::shuffle(held.sizes.begin(), held.sizes.end(), rng);
  }
  held.make(with_data);
  value = EValue(Tensor(held.impl.get()));
}

void change(Call &call) {
  const size_t at = size_t(pick(0, int64_t(call.values.size()) - 1));
  EValue &value = call.values[at];
  if (pick(0, 9) == 0) {
    switch (pick(0, 4)) {
      case 0:
        value = EValue();
        break;
      case 1:
        value = EValue(int64_t(pick(-3, 3)));
        break;
      case 2:
        value = EValue(0.5);
        break;
      case 3:
        value = EValue(true);
        break;
      default:
        call.values.resize(at);
    }
    return;
  }
  if (call.tensors[at] && value.isTensor()) return change_tensor(*call.tensors[at], value);
  if (value.isInt()) {
    const uint64_t x = uint64_t(value.toInt());
    value = EValue(int64_t(one_of<uint64_t>(
        {0, uint64_t(-1), x - 1, x + 1, 2 * x, 7, 16, 1u << 31, 1ull << 32, 1ull << 60, 1ull << 62,
         uint64_t(INT64_MAX), uint64_t(INT64_MIN), x + (1ull << 32), x + (1ull << 60)})));
  } else if (value.isDouble()) {
    value = EValue(one_of<double>({0.0, -1.0, 1e300, double(NAN), double(INFINITY)}));
  } else if (value.isNone()) {
    auto held = std::make_unique<Held>();
    held->sizes = {int32_t(pick(0, 100))};
    held->order = {0};
    held->type = ScalarType::Float;
    held->make();
    value = EValue(Tensor(held->impl.get()));
    call.tensors[at] = std::move(held);
  }
}

struct Operator {
  const char *name;
  void (*make)(Call &);
  int answered = 0, refused = 0;
};

// Whether a call ended as it should: unchanged ones with numbers.
bool run(Operator &op, uint32_t seed) {
  rng.seed(seed);
  Call call;
  op.make(call);
  const int64_t changes = pick(0, 3);
  for (int64_t i = 0; i < changes && !call.values.empty(); ++i) change(call);
  std::vector<EValue *> stack;
  for (EValue &each : call.values) stack.push_back(&each);
  KernelRuntimeContext context;
  (*get_op_function_from_registry(op.name))(context, {stack.data(), stack.size()});
  const Error error = context.failure_state();
  ++(error == Error::Ok ? op.answered : op.refused);
  if (changes) return error == Error::Ok || error == Error::InvalidArgument;
  bool right = error == Error::Ok;
  const Tensor &out = call.values.back().toTensor();
  for (ssize_t i = 0; right && i < out.numel(); ++i)
    right = std::isfinite(out.const_data_ptr<float>()[i]);
  return right;
}

}  // namespace

int main(int, char **arguments) {
  runtime_init();
  const uint32_t seed = uint32_t(std::atoi(arguments[1])),
                 cases = uint32_t(std::atoi(arguments[2]));
  bool right = true;
  for (Operator op :
       {Operator{"cloister::linear.out", linear}, Operator{"cloister::attention.out", attention},
        Operator{"cloister::embedding.out", embedding}, Operator{"cloister::norm.out", norm}}) {
    for (uint32_t i = 0; i < cases; ++i) {
      if (run(op, seed + i)) continue;
      std::printf("%s: case %u\n", op.name, seed + i);
      right = false;
    }
    std::printf("%s: %d answered, %d refused\n", op.name, op.answered, op.refused);
  }
  return right ? 0 : 1;
}
