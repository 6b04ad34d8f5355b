// Random shapes through every instruction set of this processor, compared with plain C++.
//
// usage: trial SEED CASES; prints a line for each set, ends with 1 at a difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "run.h"

using namespace cloister;

namespace {

std::mt19937 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

std::vector<float> floats(int64_t count, float size = 1) {
  std::normal_distribution<float> normal(0, size);
  std::vector<float> out(static_cast<size_t>(count));
  for (float &x : out) x = normal(rng);
  return out;
}

void in_turn(void (*work)(void *, int64_t), void *context, int64_t tasks) {
  for (int64_t task = tasks; task-- > 0;) work(context, task);
}

double apart(const std::vector<float> &a, const std::vector<float> &b) {
  double off = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    off += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    size += double(a[i]) * a[i];
  }
  return std::sqrt(off / (size + 1e-30));
}

// Any bytes are integers; scales must be numbers.
std::vector<uint8_t> weights(int64_t format, int64_t inputs, int64_t outputs) {
  const int64_t bytes = tile_bytes(format, inputs), tiles = (outputs + kTile - 1) / kTile;
  std::vector<uint8_t> data(static_cast<size_t>(bytes * tiles));
  for (uint8_t &x : data) x = uint8_t(pick(0, 255));
  const auto sixteen = [&](int64_t at, bool brain) {
    const uint16_t bits = uint16_t(brain ? pick(0x3b00, 0x3c80) : pick(0x1000, 0x2400));
    std::memcpy(&data[size_t(at)], &bits, 2);
  };
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = t * bytes;
    if (format == kW8) {
      for (int64_t n = 0; n < kTile; ++n) {
        const float x = 1e-3f * float(pick(1, 100));
        std::memcpy(&data[size_t(at + 4 * n)], &x, 4);
      }
      continue;
    }
    const bool wide = format == kQ4_K || format == kQ6_K;
    const int64_t block = wide ? bytes / (inputs / kSuper) : bytes / (inputs / kGroup);
    const int64_t scales = kTile * (format == kQ4_1 || format == kQ4_K ? 2 : 1);
    for (int64_t b = at; b < at + bytes; b += block)
      for (int64_t n = 0; n < scales; ++n) sixteen(b + 2 * n, format == kW4);
  }
  return data;
}

double linear_case(const Kernels &set, uint32_t seed) {
  rng.seed(seed);
  const int64_t format = pick(0, kFormats - 1), rows = pick(1, 3) == 1 ? 1 : pick(1, 80);
  const bool wide = format == kQ4_K || format == kQ6_K;
  const int64_t inputs = format == kW8 ? pick(1, 300)
                         : wide        ? kSuper * pick(1, 3)
                                       : kGroup * pick(1, 20);
  const int64_t outputs = pick(1, 70), input = pick(0, 3);
  const auto data = weights(format, inputs, outputs);
  const auto x = floats(rows * inputs * (input >= kGatedSilu ? 2 : 1), pick(0, 1) ? 1.0f : 1e-3f);
  const auto norm = floats(inputs), bias = floats(outputs), residual = floats(rows * outputs);
  std::vector<float> out[2];
  for (int i = 0; i < 2; ++i) {
    out[i].assign(size_t(rows * outputs), 0);
    Linear w = {};
    w.x = x.data();
    w.rows = rows;
    w.inputs = inputs;
    w.input = input;
    w.norm = input == kNormed ? norm.data() : nullptr;
    w.eps = 1e-6f;
    w.whole = seed % 2;
    w.weights = data.data();
    w.format = format;
    w.outputs = outputs;
    w.bias = seed % 3 ? bias.data() : nullptr;
    w.residual = seed % 5 ? residual.data() : nullptr;
    w.out = out[i].data();
    linear(i ? set : *kernels("portable"), w, in_turn, pick(1, 4));
  }
  return apart(out[0], out[1]);
}

double attention_case(const Kernels &set, uint32_t seed) {
  rng.seed(seed);
  const int64_t kv_heads = pick(1, 4), heads = kv_heads * pick(1, 8), size = 16 * pick(1, 10);
  const int64_t context = pick(1, 400),
                length = pick(1, 3) == 1 ? 1 : pick(1, std::min<int64_t>(context, 90));
  const int64_t start = pick(0, context - length), cache = pick(0, 2), window = pick(1, context);
  const int64_t count = context * kv_heads * size;
  const auto qkv = floats(length * (heads + 2 * kv_heads) * size), before = floats(count);
  const auto cos = floats(context * size), sin = floats(context * size), norm = floats(size);
  std::vector<float> out[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t head = head_bytes(cache, size);
    std::vector<uint8_t> k(size_t(context * kv_heads * head)), v(k);
    for (int64_t at = 0; at < context; ++at)
      for (int64_t g = 0; g < kv_heads; ++g) {
        const int64_t number = at * kv_heads + g, place = number * size;
        const Kernels &plain = *kernels("portable");
        plain.store(&before[size_t(place)], size, cache, &k[size_t(number * head)]);
        plain.store(&before[size_t(count - place - size)], size, cache, &v[size_t(number * head)]);
      }
    out[i].assign(size_t(length * heads * size), 0);
    Attention w = {};
    w.qkv = qkv.data();
    w.length = length;
    w.start = start;
    w.heads = heads;
    w.kv_heads = kv_heads;
    w.size = size;
    w.cos = seed % 3 ? cos.data() : nullptr;
    w.sin = seed % 3 ? sin.data() : nullptr;
    w.q_norm = w.k_norm = seed % 4 ? nullptr : norm.data();
    w.eps = 1e-6f;
    w.scale = 1 / std::sqrt(float(size));
    w.softcap = seed % 5 ? 0.0f : 20.0f;
    w.window = seed % 2 ? 0 : window;
    w.cache = cache;
    w.k = k.data();
    w.v = v.data();
    w.out = out[i].data();
    attention(i ? set : *kernels("portable"), w, in_turn, pick(1, 4));
  }
  return apart(out[0], out[1]);
}

}  // namespace

int main(int, char **arguments) {
  const uint32_t seed = uint32_t(std::atoi(arguments[1])),
                 cases = uint32_t(std::atoi(arguments[2]));
  bool same = true;
  for (const char *name : {"avx512", "avxvnni", "avx2", "i8mm", "neon", "portable"}) {
    const Kernels *set = kernels(name);
    if (set == nullptr) continue;
    double worst[2] = {};
    for (uint32_t i = 0; i < cases; ++i) {
      worst[0] = std::max(worst[0], linear_case(*set, seed + i));
      worst[1] = std::max(worst[1], attention_case(*set, seed + i));
    }
    std::printf("%s: linear %.1e, attention %.1e\n", name, worst[0], worst[1]);
    same &= worst[0] < 1e-3 && worst[1] < 1e-3;
  }
  return same ? 0 : 1;
}
