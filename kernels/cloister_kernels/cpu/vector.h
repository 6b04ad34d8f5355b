// Vectors of float32 as the compiler knows them, of the width that suits the instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kColumns = 4;  // vectors of one row that a product holds in registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kColumns = 2;
#else
constexpr int kLanes = 4;
constexpr int kColumns = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float *x) {
  Vec v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

inline void save(float *x, Vec v) { std::memcpy(x, &v, sizeof v); }

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline Vec magnitude(Vec x) {
  IntVec bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffff;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float half(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#elif defined(__aarch64__)
  __fp16 h;
  std::memcpy(&h, &bits, 2);
  return h;
#else
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value;
  if (exponent == 0) {
    value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t word =
      sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&value, &word, 4);
  return value;
#endif
}

inline uint16_t to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  const __fp16 h = x;
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
#else
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const uint16_t sign = word >> 16 & 0x8000;
  word &= 0x7fffffff;
  if (word > 0x7f800000) return sign | 0x7e00;
  if (word >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (word < 0x38800000) {                       // below the smallest normal one
    float scaled;
    std::memcpy(&scaled, &word, 4);
    scaled = scaled * 0x1p24f + 12582912.0f;
    std::memcpy(&word, &scaled, 4);
    return sign | (word & 0x7ff);
  }
  word += 0xfff + (word >> 13 & 1);
  return sign | (word - 0x38000000) >> 13;
#endif
}

inline Vec load_half(const uint16_t *x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = half(x[i]);
  return v;
#endif
}

inline Vec load_bytes(const int8_t *x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i];
  return v;
#endif
}

template <int by, int... at>
inline Vec across(Vec v, std::integer_sequence<int, at...>) {
  return __builtin_shufflevector(v, v, (at ^ by)...);
}

// Join all lanes, halves first.
template <int by = kLanes / 2, typename Join>
inline float folded(Vec v, Join join) {
  if constexpr (by == 0)
    return v[0];
  else
    return folded<by / 2>(join(v, across<by>(v, std::make_integer_sequence<int, kLanes>())), join);
}

// Store integers of -128 to 127 as bytes.
inline void save_bytes(int8_t *out, IntVec n) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i x = (__m256i)n;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64((__m128i *)out, _mm_packs_epi16(words, words));
#else
  const ByteVec bytes = __builtin_convertvector(n, ByteVec);
  std::memcpy(out, &bytes, sizeof bytes);
#endif
}

inline float most_of(Vec v) {
  return folded(v, [](Vec a, Vec b) { return larger(a, b); });
}

inline float sum_of(Vec v) {
  return folded(v, [](Vec a, Vec b) { return a + b; });
}

// A product that is rounded before more is added to it, whatever the compiler would contract.
inline Vec rounded(Vec x) {
#if defined(__AVX2__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// One step of turning a square: of rows i and i + `by` swap the entries that lie across.
template <int by, int... at>
inline void swap_across(Vec &a, Vec &b, std::integer_sequence<int, at...>) {
  const Vec x = __builtin_shufflevector(a, b, (at & by ? kLanes + at - by : at)...);
  b = __builtin_shufflevector(a, b, (at & by ? kLanes + at : at + by)...);
  a = x;
}

template <int by = 1>
inline void turn_square(Vec rows[kLanes]) {
  if constexpr (by < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & by) == 0)
        swap_across<by>(rows[i], rows[i + by], std::make_integer_sequence<int, kLanes>());
    turn_square<2 * by>(rows);
  }
}

// Nearest integer, ties to even, of numbers below 2**22.
inline Vec nearest(Vec x) {
  const Vec shift = splat(12582912.0f);
  return (x + shift) - shift;
}

// e**x to 2 units in the last place, 0 below -87, e**88 above.
inline Vec exponential(Vec x) {
  const Vec least = splat(-87.0f), most = splat(88.0f);
  const Vec above = larger(x, least), bounded = above < most ? above : most;
  const Vec n = nearest(bounded * 1.44269504f);
  Vec r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < least ? Vec{} : x == x ? p * scale : x;
}

inline Vec tangent(Vec x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

}  // namespace
