#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace cloister {

#if defined(__x86_64__)
extern const Kernels kAvx512, kAvxVnni, kAvx2;
#elif defined(__aarch64__)
extern const Kernels kNeon, kI8mm;
#endif
extern const Kernels kPortable;

namespace {

#if defined(__aarch64__)
struct Arm {
  bool dot, i8mm;
};

// What the system says of the processor; nothing where it is not asked.
Arm arm() {
#if defined(__linux__)
  return {(getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0, (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0};
#elif defined(__APPLE__)
  const auto has = [](const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM")};
#else
  return {};
#endif
}
#endif

// The sets that this processor runs, best first.
std::vector<const Kernels *> found() {
  std::vector<const Kernels *> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    all.push_back(&kAvx512);
  if (avx2) {
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    if (a >> 4 & 1) all.push_back(&kAvxVnni);
    all.push_back(&kAvx2);
  }
#elif defined(__aarch64__)
  const Arm has = arm();
  if (has.dot && has.i8mm) all.push_back(&kI8mm);
  if (has.dot) all.push_back(&kNeon);
#endif
  all.push_back(&kPortable);
  return all;
}

// Memory of the calling thread that the next operator takes over.
template <typename T>
T *space(std::vector<T> &held, int64_t count) {
  if (int64_t(held.size()) < count) held.resize(size_t(count));
  return held.data();
}

template <typename Work>
void each(Parallel parallel, int64_t tasks, const Work &work) {
  if (tasks == 1) return work(0);
  parallel([](void *context, int64_t task) { (*static_cast<const Work *>(context))(task); },
           const_cast<Work *>(&work), tasks);
}

constexpr int64_t kFewRows = 8;  // which one thread does while another would wake up

// Call work(row) for each row, runs of them on several threads where there are enough.
template <typename Work>
void each_row(Parallel parallel, int64_t threads, int64_t rows, const Work &work) {
  const int64_t tasks = rows < kFewRows ? 1 : std::min(rows, 4 * threads);
  each(parallel, tasks, [&](int64_t task) {
    for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) work(row);
  });
}

// Turn the sums of both halves of each group into what a set's products start from: the zero's
// share of both halves, or of each where they have scales of their own. Where there are minima the
// second is the sum of both, which these are multiplied by.
void settle(int64_t format, int64_t groups, int32_t *sums) {
  for (int64_t g = 0; g < groups; ++g, sums += 2) {
    const int32_t both = sums[0] + sums[1];
    switch (format) {
      case kQ6_K:
        sums[0] *= -32, sums[1] *= -32;
        break;
      case kQ4_1:
      case kQ4_K:
        sums[0] = 0, sums[1] = both;
        break;
      case kW4:
      case kQ4_0:
        sums[0] = -8 * both;
        break;
      default:
        sums[0] = -128 * both;
    }
  }
}

// Add what belongs to some outputs of a row besides the product.
void finish(const Linear &w, int64_t row, int64_t first, int64_t count) {
  const int64_t at = row * w.outputs + first;
  if (w.bias)
    for (int64_t n = 0; n < count; ++n) w.out[at + n] += w.bias[first + n];
  if (w.residual)
    for (int64_t n = 0; n < count; ++n) w.out[at + n] += w.residual[at + n];
}

constexpr int64_t kRowBlock = 8;  // rows whose sums may lie on the stack

// Positions whose attention is summed at a time, from a multiple of it on: so a token gets the same
// bits however a text is divided into calls, and on any number of threads.
constexpr int64_t kSpan = 2 * kBlock;

Sums placed(float *at, int64_t rows, int64_t size) {
  return {at, at + rows * size, at + rows * (size + 1)};
}

Sums cleared(float *at, int64_t rows, int64_t size) {
  const Sums sums = placed(at, rows, size);
  std::fill_n(sums.out, rows * size, 0.0f);
  std::fill_n(sums.most, rows, -INFINITY);
  std::fill_n(sums.total, rows, 0.0f);
  return sums;
}

}  // namespace

int64_t tile_bytes(int64_t format, int64_t inputs) {
  if (inputs <= 0 || (format != kW8 && inputs % kGroup)) return 0;
  const int64_t groups = (inputs + kGroup - 1) / kGroup, supers = inputs / kSuper;
  switch (format) {
    case kW4:
    case kQ4_0:
      return groups * (2 * kTile + kTile * kGroup / 2);
    case kW8:
      return 4 * kTile + groups * kTile * kGroup;
    case kQ4_1:
      return groups * (4 * kTile + kTile * kGroup / 2);
    case kQ8_0:
      return groups * (2 * kTile + kTile * kGroup);
    case kQ4_K:
      return inputs % kSuper ? 0 : supers * kTile * 148;
    case kQ6_K:
      return inputs % kSuper ? 0 : supers * kTile * 210;
    default:
      return 0;
  }
}

const Kernels *kernels(const char *name) {
  static const std::vector<const Kernels *> all = found();
  for (const Kernels *each : all)
    if (name == nullptr || std::strcmp(each->name, name) == 0) return each;
  return nullptr;
}

void linear(const Kernels &kernels, const Linear &w, Parallel parallel, int64_t threads) {
  thread_local std::vector<int8_t> held_q;
  thread_local std::vector<float> held_scale, held_x;
  thread_local std::vector<int32_t> held_sum;
  const int64_t groups = (w.inputs + kGroup - 1) / kGroup, padded = groups * kGroup;
  int8_t *q = space(held_q, w.rows * padded);
  float *scale = space(held_scale, w.rows * groups);
  int32_t *sum = space(held_sum, w.rows * groups * 2);
  const bool plain = w.input == kPlain;
  float *changed = plain ? nullptr : space(held_x, w.rows * w.inputs);
  const auto round = [&](int64_t row) {
    const float *x = w.x + row * w.inputs * (w.input >= kGatedSilu ? 2 : 1);
    float *to = changed + row * w.inputs;
    if (w.input == kNormed) kernels.norm(x, w.norm, w.eps, w.inputs, to);
    if (w.input >= kGatedSilu)
      kernels.gate(x, x + w.inputs, w.inputs, w.input == kGatedSilu ? kSilu : kGelu, to);
    kernels.quantize(plain ? x : to, w.inputs, w.whole, q + row * padded, scale + row * groups,
                     sum + row * groups * 2);
    settle(w.format, groups, sum + row * groups * 2);
  };
  each_row(parallel, threads, w.rows, round);
  const Rows rows = {q, scale, sum, padded};
  const int64_t tiles = (w.outputs + kTile - 1) / kTile, bytes = tile_bytes(w.format, w.inputs);
  const int64_t pairs = (tiles + 1) / 2, tasks = std::min(pairs, 8 * threads);
  each(parallel, tasks, [&](int64_t task) {
    for (int64_t p = pairs * task / tasks; p < pairs * (task + 1) / tasks; ++p) {
      const int64_t first = 2 * p * kTile, wide = std::min(2 * kTile, w.outputs - first);
      const bool full = wide % kTile == 0;  // else the tile's sums do not all belong in the output
      float sums[kRowBlock * 2 * kTile];
      for (int64_t row = 0, many; row < w.rows; row += many) {
        many = even(w.rows - row, kRowBlock);
        float *out = full ? w.out + row * w.outputs + first : sums;
        kernels.tiles(w.format, w.weights + 2 * p * bytes, (wide + kTile - 1) / kTile, rows, row,
                      many, out, full ? w.outputs : 2 * kTile);
        for (int64_t r = 0; r < many; ++r) {
          if (!full) std::copy_n(sums + r * 2 * kTile, wide, w.out + (row + r) * w.outputs + first);
          finish(w, row + r, first, wide);
        }
      }
    }
  });
}

void attention(const Kernels &kernels, const Attention &w, Parallel parallel, int64_t threads) {
  thread_local std::vector<float> held_q, held_sums, held_space;
  thread_local std::vector<int64_t> held_seen;
  const int64_t size = w.size, group = w.heads / w.kv_heads, rows = w.length * group;
  const int64_t width = (w.heads + 2 * w.kv_heads) * size;
  float *queries = space(held_q, w.kv_heads * rows * size);
  int64_t *last = space(held_seen, 2 * rows), *first = last + rows;
  for (int64_t t = 0; t < w.length; ++t)
    for (int64_t h = 0; h < group; ++h) {
      last[t * group + h] = w.start + t;
      first[t * group + h] = w.window > 0 ? std::max<int64_t>(0, w.start + t - w.window + 1) : 0;
    }

  const auto turned = [&](const float *x, const float *norm, int64_t at, float scale, float *out) {
    if (norm) {
      kernels.norm(x, norm, w.eps, size, out);
      x = out;
    }
    if (w.cos) {
      kernels.rotate(x, w.cos + at * size, w.sin + at * size, size, scale, out);
    } else {
      for (int64_t d = 0; d < size; ++d) out[d] = x[d] * scale;
    }
  };
  const int64_t entry = head_bytes(w.cache, size);
  const auto prepare = [&](int64_t t) {
    const float *x = w.qkv + t * width;
    const int64_t at = w.start + t;
    for (int64_t h = 0; h < w.heads; ++h, x += size)
      turned(x, w.q_norm, at, w.scale,
             queries + ((h / group) * rows + t * group + h % group) * size);
    std::vector<float> key(static_cast<size_t>(size));
    for (int64_t g = 0; g < 2 * w.kv_heads; ++g, x += size) {
      const bool value = g >= w.kv_heads;
      const int64_t place = (at * w.kv_heads + g % w.kv_heads) * entry;
      if (!value) turned(x, w.k_norm, at, 1.0f, key.data());
      kernels.store(value ? x : key.data(), size, w.cache,
                    static_cast<char *>(value ? w.v : w.k) + place);
    }
  };
  each_row(parallel, threads, w.length, prepare);

  // Rows in blocks, a task each; the spans of a single block are tasks of their own.
  const int64_t block = std::max<int64_t>(1, 64 / group) * group;
  const int64_t blocks = (rows + block - 1) / block, spans = (last[rows - 1] + kSpan) / kSpan;
  const bool apart = blocks == 1;
  const int64_t most = apart ? rows : block, sums = most * (size + 2), room = attend_space(size);
  const int64_t each_head = apart ? spans : blocks, tasks = w.kv_heads * each_head;
  float *held = space(held_sums, w.kv_heads * (apart ? 1 : blocks) * sums);
  float *spaces = space(held_space, tasks * (sums + room));
  const auto attend = [&](int64_t g, int64_t from, int64_t count, int64_t span, float *to) {
    Attend work = {};
    work.q = queries + (g * rows + from) * size;
    work.last = last + from;
    work.first = first + from;
    work.rows = count;
    work.size = size;
    work.k = static_cast<const char *>(w.k) + g * entry;
    work.v = static_cast<const char *>(w.v) + g * entry;
    work.stride = w.kv_heads * entry;
    work.begin = std::max(span * kSpan, first[from] / kBlock * kBlock);
    work.end = std::min((span + 1) * kSpan, last[from + count - 1] + 1);
    work.softcap = w.softcap;
    work.sums = cleared(to, count, size);
    work.space = to + sums;
    kernels.attend(work, w.cache);
    return work.sums;
  };
  const auto give = [&](int64_t g, int64_t from, int64_t count, const Sums &found) {
    for (int64_t row = from; row < from + count; ++row) {
      float *to = w.out + (row / group * w.heads + g * group + row % group) * size;
      const float by = 1.0f / found.total[row - from];
      for (int64_t d = 0; d < size; ++d) to[d] = found.out[(row - from) * size + d] * by;
    }
  };
  const auto task_of = [&](int64_t task) {
    const int64_t g = task / each_head, part = task % each_head;
    float *mine = spaces + task * (sums + room);
    if (apart) {
      attend(g, 0, rows, part, mine);
      return;
    }
    const int64_t from = part * block, count = std::min(block, rows - from);
    const Sums all = cleared(held + task * sums, count, size);
    for (int64_t span = first[from] / kSpan; span <= last[from + count - 1] / kSpan; ++span)
      kernels.join(attend(g, from, count, span, mine), count, size, all);
    give(g, from, count, all);
  };
  // Tasks in runs: what one reads next to its own positions, the next one needs.
  const int64_t runs = std::min(tasks, 4 * threads);
  each(parallel, runs, [&](int64_t run) {
    for (int64_t task = tasks * run / runs; task < tasks * (run + 1) / runs; ++task) task_of(task);
  });
  for (int64_t g = 0; apart && g < w.kv_heads; ++g) {
    const Sums all = cleared(held + g * sums, rows, size);
    for (int64_t span = 0; span < spans; ++span)
      kernels.join(placed(spaces + (g * spans + span) * (sums + room), rows, size), rows, size,
                   all);
    give(g, 0, rows, all);
  }
}

}  // namespace cloister
