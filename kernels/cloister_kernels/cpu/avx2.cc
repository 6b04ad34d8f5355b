// AVX2: 8 rows of weights in one register. With CLOISTER_VNNI also AVX-VNNI's products.
#include "shared.inl"

#ifdef CLOISTER_VNNI
#define KERNELS kAvxVnni
#define NAME "avxvnni"
#else
#define KERNELS kAvx2
#define NAME "avx2"
#endif

namespace {

inline __m256 halves(const uint8_t *at) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}

inline __m256 bytes(const uint8_t *at, bool negative) {
  const __m128i x = _mm_loadl_epi64((const __m128i *)at);
  return _mm256_cvtepi32_ps(negative ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
}

struct Group {
  __m256i u[8];  // of inputs 4j to 4j+3, bytes of 8 rows; signed where they are bytes
  __m256 scale, other;
};

// One half of a tile: rows 8 * side to 8 * side + 7.
template <int64_t format>
inline Group group_of(const uint8_t *tile, int64_t g, int side) {
  using L = Layout<format>;
  const uint8_t *at = L::group(tile, g);
  const int two = 16 * side, one = 8 * side;
  Group out;
  if (format == kW4) {
    out.scale = _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(at + two))), 16));
  } else if (format == kQ4_K) {
    const uint8_t *super = tile + g / 8 * kQ4KBlock + two;
    out.scale = halves(super) * bytes(at + one, false);
    out.other = halves(super + 2 * kTile) * bytes(at + kTile + one, false);
  } else if (format == kQ6_K) {
    const __m256 super = halves(tile + g / 8 * kQ6KBlock + two);
    out.scale = super * bytes(at + one, true);
    out.other = super * bytes(at + kTile + one, true);
  } else if (format != kW8) {
    out.scale = halves(at + two);
    if (format == kQ4_1) out.other = halves(at + 2 * kTile + two);
  }
  at += L::kHeader + 32 * side;
  const __m256i low = _mm256_set1_epi8(15);
  if (L::kNibbles) {
    for (int j = 0; j < 4; ++j) {
      const __m256i x = _mm256_loadu_si256((const __m256i *)(at + 64 * j));
      out.u[2 * j] = _mm256_and_si256(x, low);
      out.u[2 * j + 1] = _mm256_and_si256(_mm256_srli_epi16(x, 4), low);
    }
  } else if (L::kHalves) {
    const __m256i pair = _mm256_set1_epi8(0x30);
    for (int h = 0; h < 2; ++h, at += 192) {
      const __m256i high = _mm256_loadu_si256((const __m256i *)(at + 128));
      for (int j = 0; j < 2; ++j) {
        const __m256i x = _mm256_loadu_si256((const __m256i *)(at + 64 * j));
        const __m256i a = j ? high : _mm256_slli_epi16(high, 4);
        const __m256i b = j ? _mm256_srli_epi16(high, 2) : _mm256_slli_epi16(high, 2);
        out.u[4 * h + 2 * j] = _mm256_or_si256(_mm256_and_si256(x, low), _mm256_and_si256(a, pair));
        out.u[4 * h + 2 * j + 1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(x, 4), low),
                                                   _mm256_and_si256(b, pair));
      }
    }
  } else {
    for (int j = 0; j < 8; ++j) {
      const __m256i x = _mm256_loadu_si256((const __m256i *)(at + 64 * j));
#ifdef CLOISTER_VNNI
      out.u[j] = x;
#else
      out.u[j] = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
#endif
    }
  }
  return out;
}

inline __m256i four(const int8_t *at) {
  int32_t word;
  std::memcpy(&word, at, 4);
  return _mm256_set1_epi32(word);
}

// Products of `count` times 4 inputs from input 4 * `from` on, less the zero's.
template <int64_t format, int from, int count>
inline __m256 dot(const Group &w, const int8_t *a, int32_t start) {
#ifdef CLOISTER_VNNI
  __m256i total = _mm256_set1_epi32(start);
  for (int j = from; j < from + count; ++j)
    total = _mm256_dpbusd_avx_epi32(total, w.u[j], four(a + 4 * j));
#else
  using L = Layout<format>;
  // Pairs of products are below 2**15: with nibbles eight of them, with 6 bits two, with bytes
  // (by their magnitude, the sign on the other side) one.
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total = _mm256_set1_epi32(L::kZero == 128 ? 0 : start);
  constexpr int together = L::kNibbles ? 8 : L::kHalves ? 2 : 1;
  for (int j = from; j < from + count; j += together) {
    __m256i pairs;
    for (int i = j; i < j + together && i < from + count; ++i) {
      const __m256i b = four(a + 4 * i);
      const __m256i p = L::kZero == 128 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w.u[i]),
                                                               _mm256_sign_epi8(b, w.u[i]))
                                        : _mm256_maddubs_epi16(w.u[i], b);
      pairs = i == j ? p : _mm256_add_epi16(pairs, p);
    }
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
  }
#endif
  return _mm256_cvtepi32_ps(total);
}

// Multiply `count` rows by one half of a tile, or by both: one row is as fast as memory, which is
// then read in one go.
template <int64_t format, int count, int sides>
inline void some(const uint8_t *tile, int side, const Rows &x, int64_t first, float *out,
                 int64_t stride) {
  using L = Layout<format>;
  const int64_t groups = x.inputs / kGroup;
  const int8_t *q = x.q + first * x.inputs;
  const float *scale = x.scale + first * groups;
  const int32_t *start = x.start + first * groups * 2;
  __m256 total[count][sides];
  for (int r = 0; r < count; ++r)
    for (int z = 0; z < sides; ++z) total[r][z] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    if (side == 0) ask<format>(tile, g);
#pragma GCC unroll 2
    for (int z = 0; z < sides; ++z) {
      const Group w = group_of<format>(tile, g, side + z);
#pragma GCC unroll 8
      for (int r = 0; r < count; ++r) {
        const int8_t *a = q + r * x.inputs + g * kGroup;
        const int32_t *s = start + (r * groups + g) * 2;
        const __m256 by = _mm256_set1_ps(scale[r * groups + g]);
        __m256 &sum = total[r][z];
        const __m256 f = dot<format, 0, L::kHalves ? 4 : 8>(w, a, s[0]);
        sum = _mm256_fmadd_ps(f, format == kW8 ? by : _mm256_mul_ps(w.scale, by), sum);
        if (L::kHalves)
          sum = _mm256_fmadd_ps(dot<format, 4, 4>(w, a, s[1]), _mm256_mul_ps(w.other, by), sum);
        if (L::kMinimum)
          sum = _mm256_fnmadd_ps(w.other, _mm256_mul_ps(by, _mm256_set1_ps(float(s[1]))), sum);
      }
    }
  }
  for (int r = 0; r < count; ++r)
    for (int z = 0; z < sides; ++z) {
      const int at = 8 * (side + z);
      if (format == kW8) total[r][z] *= _mm256_loadu_ps((const float *)tile + at);
      _mm256_storeu_ps(out + r * stride + at, total[r][z]);
    }
}

template <int64_t format, int count>
void both(const uint8_t *tile, const Rows &x, int64_t first, float *out, int64_t stride) {
  if (count == 1) return some<format, count, 2>(tile, 0, x, first, out, stride);
  some<format, count, 1>(tile, 0, x, first, out, stride);
  some<format, count, 1>(tile, 1, x, first, out, stride);
}

template <int64_t format>
void multiplied(const uint8_t *tile, const Rows &x, int64_t first, int64_t rows, float *out,
                int64_t stride) {
  constexpr decltype(&both<format, 1>) by_count[] = {both<format, 1>, both<format, 2>,
                                                     both<format, 3>, both<format, 4>};
  for (int64_t row = 0; row < rows;) {
    const int64_t count = even(rows - row, 4);
    by_count[count - 1](tile, x, first + row, out + row * stride, stride);
    row += count;
  }
}

}  // namespace

#include "in_turn.inl"

namespace cloister {
extern const Kernels KERNELS = {NAME,  quantize, norm,   gate, rotate,
                                tiles, unpack,   attend, join, store};
}
