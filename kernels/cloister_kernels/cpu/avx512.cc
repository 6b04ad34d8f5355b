// AVX512 with VNNI: 16 rows of weights in one register, products of 4 inputs each in one step.
#include "shared.inl"

namespace {

struct Group {
  __m512i u[8];         // of inputs 4j to 4j+3, bytes of 16 rows
  __m512 scale, other;  // `other`: the minima, or the scales of the second half
};

template <int64_t format>
inline __m512 halves(const uint8_t *at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

inline __m512 bytes(const uint8_t *at, bool negative) {
  const __m128i x = _mm_loadu_si128((const __m128i *)at);
  return _mm512_cvtepi32_ps(negative ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
}

template <int64_t format>
inline Group group_of(const uint8_t *tile, int64_t g) {
  using L = Layout<format>;
  const uint8_t *at = L::group(tile, g);
  Group out;
  if (format == kW4) {
    out.scale = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16));
  } else if (format == kQ4_K) {
    const uint8_t *super = tile + g / 8 * kQ4KBlock;
    out.scale = halves<format>(super) * bytes(at, false);
    out.other = halves<format>(super + 2 * kTile) * bytes(at + kTile, false);
  } else if (format == kQ6_K) {
    const __m512 super = halves<format>(tile + g / 8 * kQ6KBlock);
    out.scale = super * bytes(at, true);
    out.other = super * bytes(at + kTile, true);
  } else if (format != kW8) {
    out.scale = halves<format>(at);
    if (format == kQ4_1) out.other = halves<format>(at + 2 * kTile);
  }
  at += L::kHeader;
  const __m512i low = _mm512_set1_epi8(15);
  if (L::kNibbles) {
    for (int j = 0; j < 4; ++j) {
      const __m512i x = _mm512_loadu_si512(at + 64 * j);
      out.u[2 * j] = _mm512_and_si512(x, low);
      out.u[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), low);
    }
  } else if (L::kHalves) {
    const __m512i pair = _mm512_set1_epi8(0x30);
    for (int h = 0; h < 2; ++h, at += 192) {
      const __m512i high = _mm512_loadu_si512(at + 128);
      for (int j = 0; j < 2; ++j) {
        const __m512i x = _mm512_loadu_si512(at + 64 * j);
        const __m512i a = j ? high : _mm512_slli_epi16(high, 4);
        const __m512i b = j ? _mm512_srli_epi16(high, 2) : _mm512_slli_epi16(high, 2);
        out.u[4 * h + 2 * j] = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(a, pair));
        out.u[4 * h + 2 * j + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(x, 4), low),
                                                   _mm512_and_si512(b, pair));
      }
    }
  } else {
    for (int j = 0; j < 8; ++j) out.u[j] = _mm512_loadu_si512(at + 64 * j);
  }
  return out;
}

inline __m512i four(const int8_t *at) {
  int32_t word;
  std::memcpy(&word, at, 4);
  return _mm512_set1_epi32(word);
}

template <int64_t format, int count>
inline void some(const uint8_t *tile, const Rows &x, int64_t first, float *out) {
  using L = Layout<format>;
  const int64_t groups = x.inputs / kGroup;
  const int8_t *q = x.q + first * x.inputs;
  const float *scale = x.scale + first * groups;
  const int32_t *sum = x.sum + first * groups * 2;
  __m512 total[count];
  for (int r = 0; r < count; ++r) total[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const Group w = group_of<format>(tile, g);
#pragma GCC unroll 16
    for (int r = 0; r < count; ++r) {
      const int8_t *a = q + r * x.inputs + g * kGroup;
      const int32_t *s = sum + (r * groups + g) * 2;
      const __m512 by = _mm512_set1_ps(scale[r * groups + g]);
      __m512i dot = L::kZero ? _mm512_set1_epi32(-L::kZero * (L::kHalves ? s[0] : s[0] + s[1]))
                             : _mm512_setzero_si512();
      for (int j = 0; j < (L::kHalves ? 4 : 8); ++j)
        dot = _mm512_dpbusd_epi32(dot, w.u[j], four(a + 4 * j));
      const __m512 f = _mm512_cvtepi32_ps(dot);
      if (format == kW8)
        total[r] = _mm512_fmadd_ps(f, by, total[r]);
      else
        total[r] = _mm512_fmadd_ps(f, _mm512_mul_ps(w.scale, by), total[r]);
      if (L::kHalves) {
        __m512i second = _mm512_set1_epi32(-L::kZero * s[1]);
        for (int j = 4; j < 8; ++j) second = _mm512_dpbusd_epi32(second, w.u[j], four(a + 4 * j));
        total[r] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), _mm512_mul_ps(w.other, by), total[r]);
      }
      if (L::kMinimum)
        total[r] = _mm512_fnmadd_ps(w.other, _mm512_mul_ps(by, _mm512_set1_ps(float(s[0] + s[1]))),
                                    total[r]);
    }
  }
  for (int r = 0; r < count; ++r) {
    if (format == kW8) total[r] *= _mm512_loadu_ps((const float *)tile);
    _mm512_storeu_ps(out + r * kTile, total[r]);
  }
}

template <int64_t format>
void multiplied(const uint8_t *tile, const Rows &x, int64_t first, int64_t rows, float *out) {
  int64_t row = 0;
  for (; row + 8 <= rows; row += 8) some<format, 8>(tile, x, first + row, out + row * kTile);
  for (; row + 4 <= rows; row += 4) some<format, 4>(tile, x, first + row, out + row * kTile);
  for (; row + 2 <= rows; row += 2) some<format, 2>(tile, x, first + row, out + row * kTile);
  for (; row < rows; ++row) some<format, 1>(tile, x, first + row, out + row * kTile);
}

void tile(int64_t format, const uint8_t *weights, const Rows &x, int64_t first, int64_t rows,
          float *out) {
  DISPATCH(multiplied, format, weights, x, first, rows, out)
}

}  // namespace

namespace cloister {
extern const Kernels kAvx512 = {"avx512", quantize, norm, gate, tile, unpack, attend, store};
}
