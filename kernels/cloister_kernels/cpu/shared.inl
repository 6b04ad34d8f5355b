// What needs no instruction of one set by name: the compiler turns it into those of each.
#include "kernels.h"
#include "vector.h"

namespace {

using namespace cloister;

void quantize(const float *x, int64_t inputs, bool whole, int8_t *q, float *scale, int32_t *sum) {
  const int64_t groups = (inputs + kGroup - 1) / kGroup, full = inputs / kGroup;
  float most = 0;
  Vec odd = {};  // NaN where an entry is not finite
  for (int64_t g = 0; g < full; ++g) {
    Vec m = {};
    for (int64_t k = 0; k < kGroup; k += kLanes) {
      const Vec a = magnitude(load(x + g * kGroup + k));
      m = larger(m, a);
      odd += a * 0.0f;
    }
    scale[g] = most_of(m);
    most = scale[g] <= most ? most : scale[g];
  }
  if (full < groups) {
    float m = 0;
    for (int64_t k = full * kGroup; k < inputs; ++k) {
      const float a = __builtin_fabsf(x[k]);
      m = a > m ? a : m;
      odd[0] += a * 0.0f;
    }
    scale[full] = m;
    most = m <= most ? most : m;
  }
  most += sum_of(odd);
  for (int64_t g = 0; g < groups; ++g) {
    const float m = whole || most != most ? most : scale[g];
    const float inverse = m > 1e-36f ? 127.0f / m : 0.0f;  // finite
    scale[g] = m / 127.0f;
    float entries[kGroup];
    const float *from = x + g * kGroup;
    if (g == full || inverse == 0) {
      std::memset(entries, 0, sizeof entries);
      if (inverse > 0) std::memcpy(entries, from, size_t(inputs - g * kGroup) * sizeof(float));
      from = entries;
    }
    for (int h = 0; h < 2; ++h) {
      Vec total = {};
      for (int64_t k = h * kGroup / 2; k < (h + 1) * kGroup / 2; k += kLanes) {
        const Vec n = nearest(rounded(load(from + k) * inverse));
        save_bytes(q + g * kGroup + k, __builtin_convertvector(n, IntVec));
        total += n;
      }
      sum[2 * g + h] = int32_t(sum_of(total));  // exact
    }
  }
}

void norm(const float *x, const float *weight, float eps, int64_t size, float *out) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec v = load(x + i);
    total += v * v;
  }
  float squares = sum_of(total);
  for (; i < size; ++i) squares += x[i] * x[i];
  const float factor = 1.0f / __builtin_sqrtf(squares / float(size) + eps);
  for (i = 0; i + kLanes <= size; i += kLanes)
    save(out + i, load(x + i) * factor * load(weight + i));
  for (; i < size; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(const float *x, const float *cos, const float *sin, int64_t size, float scale,
            float *out) {
  const int64_t half = size / 2;
  int64_t d = 0;
  for (; d + kLanes <= half; d += kLanes) {
    const Vec a = load(x + d), b = load(x + d + half);
    save(out + d, (a * load(cos + d) - b * load(sin + d)) * scale);
    save(out + d + half, (b * load(cos + d + half) + a * load(sin + d + half)) * scale);
  }
  for (; d < half; ++d) {
    const float a = x[d], b = x[d + half];
    out[d] = (a * cos[d] - b * sin[d]) * scale;
    out[d + half] = (b * cos[d + half] + a * sin[d + half]) * scale;
  }
}

template <int64_t kind>
Vec activated(Vec x) {
  if (kind == kSilu) return x / (1.0f + exponential(-x));
  const Vec inner = 0.797884561f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tangent(inner));
}

template <int64_t kind>
void gated(const float *gate, const float *up, int64_t size, float *out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    save(out + i, activated<kind>(load(gate + i)) * load(up + i));
  for (; i < size; ++i) out[i] = activated<kind>(splat(gate[i]))[0] * up[i];
}

void gate(const float *gate, const float *up, int64_t size, int64_t activation, float *out) {
  (activation == kSilu ? gated<kSilu> : gated<kGelu>)(gate, up, size, out);
}

// Attention: the scores of a block of positions for all rows, then their values.

constexpr int kRows = 4;  // rows that a product holds in registers

template <int64_t cache>
Vec entry(const void *head, int64_t place) {
  if (cache == kFloat32) return load((const float *)head + place);
  if (cache == kFloat16) return load_half((const uint16_t *)head + place);
  return load_bytes((const int8_t *)head + place);
}

const void *head_at(const void *first, const Attend &w, int64_t position) {
  return (const uint8_t *)first + position * w.stride;
}

// The scale of a head in 8 bits.
float scale_of(const void *head, int64_t size) {
  float scale;
  std::memcpy(&scale, (const uint8_t *)head + size, sizeof(scale));
  return scale;
}

// Ask for what lies at `place` of a head some positions on: heads are apart, which no processor
// foresees, and asking for many at once would wait for them.
template <int64_t cache>
void ask_entry(const void *head, int64_t place, int64_t bytes_on) {
  constexpr int64_t bytes = cache == kFloat32 ? 4 : cache == kFloat16 ? 2 : 1;
  if (place * bytes % 64 == 0) __builtin_prefetch((const uint8_t *)head + place * bytes + bytes_on);
}

// Turn the keys of kLanes positions from `begin` + j on: out [D, kBlock]; those beyond `count` are
// any.
template <int64_t cache, bool all>
void turn_some(const Attend &w, int64_t begin, int64_t j, int64_t count, float *out) {
  for (int64_t d = 0; d < w.size; d += kLanes) {
    Vec square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = begin + (all || j + i < count ? j + i : 0);
      const void *head = head_at(w.k, w, at);
      square[i] = entry<cache>(head, d);
      if (cache == kInt8) square[i] *= scale_of(head, w.size);
      ask_entry<cache>(head, d, kBlock * w.stride);
      if (begin == w.begin) ask_entry<cache>(head_at(w.v, w, at), d, 0);
    }
    turn_square(square);
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) save(out + (d + c) * kBlock + j, square[c]);
  }
}

template <int64_t cache>
void turn(const Attend &w, int64_t begin, int64_t count, float *out) {
  for (int64_t j = 0; j < kBlock; j += kLanes)
    if (j + kLanes <= count)
      turn_some<cache, true>(w, begin, j, count, out);
    else
      turn_some<cache, false>(w, begin, j, count, out);
}

// Scores [kRows, kBlock] of some rows.
template <int count>
void score(const float *q, int64_t size, const float *k, float *out) {
  for (int64_t j = 0; j < kBlock; j += kColumns * kLanes) {
    Vec sums[count][kColumns] = {};
    for (int64_t d = 0; d < size; ++d) {
      Vec column[kColumns];
      for (int c = 0; c < kColumns; ++c) column[c] = load(k + d * kBlock + j + c * kLanes);
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < kColumns; ++c) sums[r][c] += q[r * size + d] * column[c];
    }
    for (int r = 0; r < count; ++r)
      for (int c = 0; c < kColumns; ++c) save(out + r * kBlock + j + c * kLanes, sums[r][c]);
  }
}

// Mask and cap the scores of one row, and turn them into exponentials; scales what there was.
void soften(const Attend &w, int64_t row, int64_t begin, int64_t count, float *scores) {
  Vec most = splat(w.sums.most[row]);
  const int64_t first = w.first[row] - begin, last = w.last[row] - begin;
  const float low = -__builtin_inff();
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    Vec s = load(scores + j);
    if (w.softcap > 0) s = w.softcap * tangent(s / w.softcap);
    if (j < first || j + kLanes > last + 1 || j + kLanes > count)
      for (int i = 0; i < kLanes; ++i)
        if (j + i < first || j + i > last || j + i >= count) s[i] = low;
    save(scores + j, s);
    most = larger(most, s);
  }
  const float peak = most_of(most);
  if (peak == low) {  // it sees nothing here
    for (int64_t j = 0; j < kBlock; ++j) scores[j] = 0;
    return;
  }
  Vec total = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Vec p = exponential(load(scores + j) - peak);
    save(scores + j, p);
    total += p;
  }
  const float before = exponential(splat(w.sums.most[row] - peak))[0];
  w.sums.total[row] = w.sums.total[row] * before + sum_of(total);
  w.sums.most[row] = peak;
  if (before != 1.0f)
    for (int64_t d = 0; d < w.size; d += kLanes)
      save(w.sums.out + row * w.size + d, load(w.sums.out + row * w.size + d) * before);
}

template <int64_t cache, int count>
void weigh(const Attend &w, int64_t row, int64_t begin, int64_t positions, const float *scores) {
  for (int64_t d = 0; d < w.size; d += kColumns * kLanes) {
    const int columns = w.size - d < kColumns * kLanes ? int((w.size - d) / kLanes) : kColumns;
    Vec sums[count][kColumns] = {};
    if (columns == kColumns) {
      for (int64_t j = 0; j < positions; ++j) {
        const void *head = head_at(w.v, w, begin + j);
        Vec v[kColumns];
        for (int c = 0; c < kColumns; ++c) {
          v[c] = entry<cache>(head, d + c * kLanes);
          if (row == 0) ask_entry<cache>(head, d + c * kLanes, kBlock * w.stride);
        }
        for (int r = 0; r < count; ++r)
          for (int c = 0; c < kColumns; ++c) sums[r][c] += scores[r * kBlock + j] * v[c];
      }
    } else {
      for (int64_t j = 0; j < positions; ++j)
        for (int c = 0; c < columns; ++c) {
          const Vec v = entry<cache>(head_at(w.v, w, begin + j), d + c * kLanes);
          for (int r = 0; r < count; ++r) sums[r][c] += scores[r * kBlock + j] * v;
        }
    }
    for (int r = 0; r < count; ++r)
      for (int c = 0; c < columns; ++c) {
        float *out = w.sums.out + (row + r) * w.size + d + c * kLanes;
        save(out, load(out) + sums[r][c]);
      }
  }
}

template <int64_t cache>
void attended(const Attend &w) {
  float *keys = w.space, *scores = keys + w.size * kBlock;
  for (int64_t begin = w.begin; begin < w.end; begin += kBlock) {
    const int64_t count = w.end - begin < kBlock ? w.end - begin : kBlock;
    turn<cache>(w, begin, count, keys);
    float scales[kBlock];  // of the values
    if (cache == kInt8)
      for (int64_t j = 0; j < count; ++j) scales[j] = scale_of(head_at(w.v, w, begin + j), w.size);
    for (int64_t row = 0; row < w.rows; row += kRows) {
      const int rows = w.rows - row < kRows ? int(w.rows - row) : kRows;
      const float *q = w.q + row * w.size;
      if (rows == kRows)
        score<kRows>(q, w.size, keys, scores);
      else
        for (int r = 0; r < rows; ++r) score<1>(q + r * w.size, w.size, keys, scores + r * kBlock);
      for (int r = 0; r < rows; ++r) {
        soften(w, row + r, begin, count, scores + r * kBlock);
        if (cache == kInt8)
          for (int64_t j = 0; j < count; ++j) scores[r * kBlock + j] *= scales[j];
      }
      if (rows == kRows)
        weigh<cache, kRows>(w, row, begin, count, scores);
      else
        for (int r = 0; r < rows; ++r)
          weigh<cache, 1>(w, row + r, begin, count, scores + r * kBlock);
    }
  }
}

void attend(const Attend &work, int64_t cache) {
  (cache == kFloat32   ? attended<kFloat32>
   : cache == kFloat16 ? attended<kFloat16>
                       : attended<kInt8>)(work);
}

void join(const Sums &from, int64_t rows, int64_t size, const Sums &to) {
  for (int64_t row = 0; row < rows; ++row) {
    if (from.most[row] == -__builtin_inff()) continue;  // it saw nothing
    const float peak = to.most[row] >= from.most[row] ? to.most[row] : from.most[row];
    const float before = exponential(splat(to.most[row] - peak))[0];
    const float more = exponential(splat(from.most[row] - peak))[0];
    to.total[row] = to.total[row] * before + from.total[row] * more;
    to.most[row] = peak;
    float *out = to.out + row * size;
    const float *other = from.out + row * size;
    for (int64_t d = 0; d < size; d += kLanes)
      save(out + d, load(out + d) * before + load(other + d) * more);
  }
}

void store(const float *x, int64_t size, int64_t cache, void *out) {
  if (cache == kFloat32) {
    std::memcpy(out, x, size_t(size) * 4);
  } else if (cache == kFloat16) {
    for (int64_t i = 0; i < size; ++i) ((uint16_t *)out)[i] = to_half(x[i]);
  } else {
    float most = 0;
    bool finite = true;
    for (int64_t i = 0; i < size; ++i) {
      const float a = __builtin_fabsf(x[i]);
      most = a > most ? a : most;
      finite &= a <= 3.40282347e38f;
    }
    const float scale = finite ? most / 127.0f : __builtin_nanf("");
    std::memcpy((uint8_t *)out + size, &scale, sizeof(scale));
    const float inverse = finite && most > 1e-36f ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < size; ++i) {
      ((int8_t *)out)[i] = int8_t(inverse > 0 ? __builtin_rintf(x[i] * inverse) : 0.0f);
    }
  }
}

// The layout of packed weights, see `Format`.

inline float brain(const uint8_t *at, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, at + 2 * i, 2);
  const uint32_t word = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

inline float half_at(const uint8_t *at, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, at + 2 * i, 2);
  return half(bits);
}

constexpr int64_t kQ4KGroup = 2 * kTile + kTile * kGroup / 2;           // scales, minima, nibbles
constexpr int64_t kQ4KBlock = 4 * kTile + kSuper / kGroup * kQ4KGroup;  // two float16 each row
constexpr int64_t kQ6KGroup = 2 * kTile + kTile * kGroup * 6 / 8;       // two scales, 6 bits
constexpr int64_t kQ6KBlock = 2 * kTile + kSuper / kGroup * kQ6KGroup;

template <int64_t format>
struct Layout {
  static constexpr bool kNibbles = format != kW8 && format != kQ8_0 && format != kQ6_K;
  static constexpr bool kMinimum = format == kQ4_1 || format == kQ4_K;
  static constexpr bool kHalves = format == kQ6_K;  // a scale for 16 inputs
  static constexpr int32_t kZero = format == kW4 || format == kQ4_0 ? 8
                                   : format == kQ6_K                ? 32
                                   : kMinimum                       ? 0
                                                                    : 128;
  static constexpr int64_t kHeader = format == kW8 ? 0 : format == kQ4_1 ? 4 * kTile : 2 * kTile;
  static constexpr int64_t kBytes = kHeader + kTile * kGroup * (kNibbles ? 4 : kHalves ? 6 : 8) / 8;

  // Where a group begins, its scales first.
  static const uint8_t *group(const uint8_t *tile, int64_t g) {
    constexpr int64_t within = kSuper / kGroup;
    if (format == kQ4_K) return tile + g / within * kQ4KBlock + 4 * kTile + g % within * kQ4KGroup;
    if (format == kQ6_K) return tile + g / within * kQ6KBlock + 2 * kTile + g % within * kQ6KGroup;
    return tile + (format == kW8 ? 4 * kTile : 0) + g * kBytes;
  }

  static float scale(const uint8_t *tile, int64_t g, int64_t half_group, int64_t row) {
    const uint8_t *at = group(tile, g);
    if (format == kW4) return brain(at, row);
    if (format == kW8) {
      float x;
      std::memcpy(&x, tile + 4 * row, 4);
      return x;
    }
    if (format == kQ4_K) return half_at(tile + g / 8 * kQ4KBlock, row) * float(at[row]);
    if (format == kQ6_K)
      return half_at(tile + g / 8 * kQ6KBlock, row) * float(int8_t(at[half_group * kTile + row]));
    return half_at(at, row);
  }

  static float minimum(const uint8_t *tile, int64_t g, int64_t row) {
    const uint8_t *at = group(tile, g);
    if (format == kQ4_1) return half_at(at, kTile + row);
    if (format == kQ4_K)
      return half_at(tile + g / 8 * kQ4KBlock, kTile + row) * float(at[kTile + row]);
    return 0;
  }

  static int32_t integer(const uint8_t *tile, int64_t g, int64_t row, int64_t k) {
    const uint8_t *at = group(tile, g) + kHeader;
    if (kNibbles) return at[k / 8 * 64 + row * 4 + k % 4] >> (k % 8 / 4 * 4) & 15;
    if (!kHalves) return at[k / 4 * 64 + row * 4 + k % 4];
    at += k / 16 * 192;  // of 16 inputs the low nibbles, then the high pairs of bits
    k %= 16;
    const int32_t low = at[k / 8 * 64 + row * 4 + k % 4] >> (k % 8 / 4 * 4) & 15;
    return low | (at[128 + row * 4 + k % 4] >> (2 * (k / 4)) & 3) << 4;
  }
};

// Ask for a tile's weights some groups ahead, those of the next tile behind its last: processors
// foresee them up to the end of a page only.
template <int64_t format>
inline void ask(const uint8_t *tile, int64_t g) {
  const uint8_t *at = Layout<format>::group(tile, g + 12);
  for (int64_t line = 0; line < Layout<format>::kBytes; line += 64) __builtin_prefetch(at + line);
}

template <int64_t format>
void unpacked(const uint8_t *tile, int64_t inputs, int64_t row, float *out) {
  using L = Layout<format>;
  for (int64_t k = 0; k < inputs; ++k) {
    const int64_t g = k / kGroup, within = k % kGroup;
    out[k] =
        L::scale(tile, g, within / 16, row) * float(L::integer(tile, g, row, within) - L::kZero) -
        L::minimum(tile, g, row);
  }
}

// Call `function<format>` with what follows.
#define DISPATCH(function, format, ...) \
  switch (format) {                     \
    case kW4:                           \
      function<kW4>(__VA_ARGS__);       \
      break;                            \
    case kW8:                           \
      function<kW8>(__VA_ARGS__);       \
      break;                            \
    case kQ4_0:                         \
      function<kQ4_0>(__VA_ARGS__);     \
      break;                            \
    case kQ4_1:                         \
      function<kQ4_1>(__VA_ARGS__);     \
      break;                            \
    case kQ8_0:                         \
      function<kQ8_0>(__VA_ARGS__);     \
      break;                            \
    case kQ4_K:                         \
      function<kQ4_K>(__VA_ARGS__);     \
      break;                            \
    default:                            \
      function<kQ6_K>(__VA_ARGS__);     \
  }

void unpack(int64_t format, const uint8_t *tile, int64_t inputs, int64_t row, float *out) {
  DISPATCH(unpacked, format, tile, inputs, row, out)
}

}  // namespace
