// AVX512 with VNNI: 16 rows of weights in one register, products of 4 inputs each in one step.
#include "shared.inl"

namespace {

inline __m512 halves(const uint8_t *at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

inline __m512 bytes(const uint8_t *at, bool negative) {
  const __m128i x = _mm_loadu_si128((const __m128i *)at);
  return _mm512_cvtepi32_ps(negative ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
}

struct Scales {
  __m512 first, other;  // `other`: the minima, or the scales of the second half
};

template <int64_t format>
inline Scales scales_of(const uint8_t *tile, int64_t g) {
  const uint8_t *at = Layout<format>::group(tile, g);
  Scales out = {};
  if (format == kW4) {
    out.first = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
  } else if (format == kQ4_K) {
    const uint8_t *super = tile + g / 8 * kQ4KBlock;
    out.first = halves(super) * bytes(at, false);
    out.other = halves(super + 2 * kTile) * bytes(at + kTile, false);
  } else if (format == kQ6_K) {
    const __m512 super = halves(tile + g / 8 * kQ6KBlock);
    out.first = super * bytes(at, true);
    out.other = super * bytes(at + kTile, true);
  } else if (format != kW8) {
    out.first = halves(at);
    if (format == kQ4_1) out.other = halves(at + 2 * kTile);
  }
  return out;
}

// Half a group: u[j] has of inputs 4j to 4j+3 the bytes of 16 rows.
template <int64_t format>
inline void quads_of(const uint8_t *tile, int64_t g, int h, __m512i u[4]) {
  using L = Layout<format>;
  const uint8_t *at = L::group(tile, g) + L::kHeader;
  const __m512i low = _mm512_set1_epi8(15);
  if (L::kNibbles) {
    for (int j = 0; j < 2; ++j) {
      const __m512i x = _mm512_loadu_si512(at + 128 * h + 64 * j);
      u[2 * j] = _mm512_and_si512(x, low);
      u[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
    }
  } else if (L::kHalves) {
    at += 192 * h;
    const __m512i pair = _mm512_set1_epi8(0x30), high = _mm512_loadu_si512(at + 128);
    for (int j = 0; j < 2; ++j) {
      const __m512i x = _mm512_loadu_si512(at + 64 * j);
      const __m512i a = j ? high : _mm512_slli_epi16(high, 4);
      const __m512i b = j ? _mm512_srli_epi16(high, 2) : _mm512_slli_epi16(high, 2);
      u[2 * j] = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(a, pair));
      u[2 * j + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(x, 4), low),
                                     _mm512_and_si512(b, pair));
    }
  } else {
    for (int j = 0; j < 4; ++j) u[j] = _mm512_loadu_si512(at + 256 * h + 64 * j);
  }
}

inline __m512i four(const int8_t *at) {
  int32_t word;
  std::memcpy(&word, at, 4);
  return _mm512_set1_epi32(word);
}

// Multiply `count` rows by `many` tiles, which share what is loaded of the rows.
template <int64_t format, int count, int many>
inline void some(const uint8_t *tile, int64_t size, const Rows &x, int64_t first, float *out,
                 int64_t stride) {
  using L = Layout<format>;
  const int64_t groups = x.inputs / kGroup;
  const int8_t *q = x.q + first * x.inputs;
  const float *scale = x.scale + first * groups;
  const int32_t *start = x.start + first * groups * 2;
  __m512 total[count][many];
  for (int r = 0; r < count; ++r)
    for (int t = 0; t < many; ++t) total[r][t] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    Scales by_tile[many];
    for (int t = 0; t < many; ++t) by_tile[t] = scales_of<format>(tile + t * size, g);
    for (int t = 0; t < many; ++t) ask<format>(tile + t * size, g);
    __m512i dot[count][many];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m512i u[many][4];
      for (int t = 0; t < many; ++t) quads_of<format>(tile + t * size, g, h, u[t]);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const int64_t at = r * groups + g;
        if (h == 0 || L::kHalves)
          for (int t = 0; t < many; ++t)
            dot[r][t] = L::kZero ? _mm512_set1_epi32(start[2 * at + h]) : _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m512i b = four(q + r * x.inputs + g * kGroup + 16 * h + 4 * j);
          for (int t = 0; t < many; ++t) dot[r][t] = _mm512_dpbusd_epi32(dot[r][t], u[t][j], b);
        }
        if (h == 0 && !L::kHalves) continue;
        const __m512 by = _mm512_set1_ps(scale[at]);
        for (int t = 0; t < many; ++t) {
          const __m512 f = _mm512_cvtepi32_ps(dot[r][t]);
          const __m512 s = L::kHalves && h ? by_tile[t].other : by_tile[t].first;
          total[r][t] = _mm512_fmadd_ps(f, format == kW8 ? by : _mm512_mul_ps(s, by), total[r][t]);
          if (L::kMinimum)
            total[r][t] = _mm512_fnmadd_ps(
                by_tile[t].other, _mm512_mul_ps(by, _mm512_set1_ps(float(start[2 * at + 1]))),
                total[r][t]);
        }
      }
    }
  }
  for (int r = 0; r < count; ++r)
    for (int t = 0; t < many; ++t) {
      if (format == kW8) total[r][t] *= _mm512_loadu_ps((const float *)(tile + t * size));
      _mm512_storeu_ps(out + r * stride + t * kTile, total[r][t]);
    }
}

template <int64_t format, int count>
void together(const uint8_t *tile, int64_t many, int64_t size, const Rows &x, int64_t first,
              float *out, int64_t stride) {
  if (count > 1 && many == 2) return some<format, count, 2>(tile, size, x, first, out, stride);
  for (int64_t t = 0; t < many; ++t)  // memory is read in one go
    some<format, count, 1>(tile + t * size, size, x, first, out + t * kTile, stride);
}

template <int64_t format>
void multiplied(const uint8_t *tile, int64_t many, int64_t size, const Rows &x, int64_t first,
                int64_t rows, float *out, int64_t stride) {
  constexpr decltype(&together<format, 1>) by_count[] = {together<format, 1>, together<format, 2>,
                                                         together<format, 3>, together<format, 4>};
  for (int64_t row = 0; row < rows;) {
    const int64_t count = even(rows - row, 4);
    by_count[count - 1](tile, many, size, x, first + row, out + row * stride, stride);
    row += count;
  }
}

void tiles(int64_t format, const uint8_t *weights, int64_t count, const Rows &x, int64_t first,
           int64_t rows, float *out, int64_t stride) {
  const int64_t size = tile_bytes(format, x.inputs);
  DISPATCH(multiplied, format, weights, count, size, x, first, rows, out, stride)
}

}  // namespace

namespace cloister {
extern const Kernels kAvx512 = {"avx512", quantize, norm,   gate, rotate,
                                tiles,    unpack,   attend, join, store};
}
