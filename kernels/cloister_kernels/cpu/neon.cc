// NEON with the dot product of ARMv8.2. With CLOISTER_I8MM also the matrix product of ARMv8.6.
#include "shared.inl"

#ifdef CLOISTER_I8MM
#define KERNELS kI8mm
#define NAME "i8mm"
#else
#define KERNELS kNeon
#define NAME "neon"
#endif

namespace {

struct Group {
  int8x16_t w[8][4];  // [quad of inputs][4 rows], signed where they are bytes
  float32x4_t scale[4], other[4];
};

inline float32x4_t halves(const uint8_t *at) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
}

inline float32x4_t bytes(const uint8_t *at, bool negative) {
  uint32_t word;
  std::memcpy(&word, at, 4);
  const uint8x8_t x = vreinterpret_u8_u32(vdup_n_u32(word));
  if (negative) return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(x)))));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(x))));
}

template <int64_t format>
inline void group_of(const uint8_t *tile, int64_t g, Group &out) {
  using L = Layout<format>;
  const uint8_t *at = L::group(tile, g);
  for (int i = 0; i < 4; ++i) {
    if (format == kW4) {
      out.scale[i] =
          vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(at + 8 * i)), 16));
    } else if (format == kQ4_K) {
      const uint8_t *super = tile + g / 8 * kQ4KBlock + 8 * i;
      out.scale[i] = halves(super) * bytes(at + 4 * i, false);
      out.other[i] = halves(super + 2 * kTile) * bytes(at + kTile + 4 * i, false);
    } else if (format == kQ6_K) {
      const float32x4_t super = halves(tile + g / 8 * kQ6KBlock + 8 * i);
      out.scale[i] = super * bytes(at + 4 * i, true);
      out.other[i] = super * bytes(at + kTile + 4 * i, true);
    } else if (format != kW8) {
      out.scale[i] = halves(at + 8 * i);
      if (format == kQ4_1) out.other[i] = halves(at + 2 * kTile + 8 * i);
    }
  }
  at += L::kHeader;
  const uint8x16_t low = vdupq_n_u8(15);
  for (int i = 0; i < 4; ++i) {
    if (L::kNibbles) {
      for (int j = 0; j < 4; ++j) {
        const uint8x16_t x = vld1q_u8(at + 64 * j + 16 * i);
        out.w[2 * j][i] = vreinterpretq_s8_u8(vandq_u8(x, low));
        out.w[2 * j + 1][i] = vreinterpretq_s8_u8(vshrq_n_u8(x, 4));
      }
    } else if (L::kHalves) {
      const uint8x16_t two = vdupq_n_u8(3);
      for (int h = 0; h < 2; ++h) {
        const uint8_t *from = at + 192 * h + 16 * i;
        const uint8x16_t a = vld1q_u8(from), b = vld1q_u8(from + 64), high = vld1q_u8(from + 128);
        const uint8x16_t lows[] = {vandq_u8(a, low), vshrq_n_u8(a, 4), vandq_u8(b, low),
                                   vshrq_n_u8(b, 4)};
        const uint8x16_t pairs[] = {vandq_u8(high, two), vandq_u8(vshrq_n_u8(high, 2), two),
                                    vandq_u8(vshrq_n_u8(high, 4), two), vshrq_n_u8(high, 6)};
        for (int j = 0; j < 4; ++j)
          out.w[4 * h + j][i] = vreinterpretq_s8_u8(vorrq_u8(lows[j], vshlq_n_u8(pairs[j], 4)));
      }
    } else {
      for (int j = 0; j < 8; ++j)
        out.w[j][i] =
            vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at + 64 * j + 16 * i), vdupq_n_u8(128)));
    }
  }
}

inline int8x16_t four(const int8_t *at) {
  int32_t word;
  std::memcpy(&word, at, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

// Add a row's products of some quads to its 16 sums.
inline void dot(const Group &w, const int8_t *a, int from, int count, int32x4_t sums[4]) {
  for (int j = from; j < from + count; ++j) {
    const int8x16_t b = four(a + 4 * j);
    for (int i = 0; i < 4; ++i) sums[i] = vdotq_s32(sums[i], w.w[j][i], b);
  }
}

#ifdef CLOISTER_I8MM
// The same for two rows.
inline void dot_two(const Group &w, const int8_t *a, const int8_t *b, int from, int count,
                    int32x4_t first[4], int32x4_t second[4]) {
  int32x4_t pairs[4][2] = {};
  for (int j = from; j < from + count; j += 2) {
    const int8x16_t x = vcombine_s8(vld1_s8(a + 4 * j), vld1_s8(b + 4 * j));
    for (int i = 0; i < 4; ++i) {
      const int32x4_t lo = vreinterpretq_s32_s8(w.w[j][i]),
                      hi = vreinterpretq_s32_s8(w.w[j + 1][i]);
      pairs[i][0] = vmmlaq_s32(pairs[i][0], vreinterpretq_s8_s32(vzip1q_s32(lo, hi)), x);
      pairs[i][1] = vmmlaq_s32(pairs[i][1], vreinterpretq_s8_s32(vzip2q_s32(lo, hi)), x);
    }
  }
  for (int i = 0; i < 4; ++i) {
    first[i] = vaddq_s32(first[i], vuzp1q_s32(pairs[i][0], pairs[i][1]));
    second[i] = vaddq_s32(second[i], vuzp2q_s32(pairs[i][0], pairs[i][1]));
  }
}
#endif

template <int64_t format>
inline void add(const Group &w, const int32x4_t dots[2][4], float by, const int32_t *start,
                float32x4_t total[4]) {
  using L = Layout<format>;
  constexpr bool bytes = L::kZero == 128;  // which are signed here
  for (int i = 0; i < 4; ++i) {
    const float32x4_t f = vcvtq_f32_s32(vaddq_s32(dots[0][i], vdupq_n_s32(bytes ? 0 : start[0])));
    total[i] =
        vfmaq_f32(total[i], f, format == kW8 ? vdupq_n_f32(by) : vmulq_n_f32(w.scale[i], by));
    if (L::kHalves) {
      const float32x4_t g = vcvtq_f32_s32(vaddq_s32(dots[1][i], vdupq_n_s32(start[1])));
      total[i] = vfmaq_f32(total[i], g, vmulq_n_f32(w.other[i], by));
    }
    if (L::kMinimum) total[i] = vfmsq_f32(total[i], w.other[i], vdupq_n_f32(by * float(start[1])));
  }
}

template <int64_t format, int count>
inline void some(const uint8_t *tile, const Rows &x, int64_t first, float *out, int64_t stride) {
  using L = Layout<format>;
  const int64_t groups = x.inputs / kGroup;
  float32x4_t total[count][4];
  for (int r = 0; r < count; ++r)
    for (int i = 0; i < 4; ++i) total[r][i] = vdupq_n_f32(0);
  for (int64_t g = 0; g < groups; ++g) {
    Group w;
    group_of<format>(tile, g, w);
    int32x4_t dots[count][2][4] = {};
    const int8_t *a = x.q + first * x.inputs + g * kGroup;
    for (int h = 0; h < (L::kHalves ? 2 : 1); ++h) {
      const int from = 4 * h, quads = L::kHalves ? 4 : 8;
#ifdef CLOISTER_I8MM
      if constexpr (count == 2) {
        dot_two(w, a, a + x.inputs, from, quads, dots[0][h], dots[1][h]);
        continue;
      }
#endif
      for (int r = 0; r < count; ++r) dot(w, a + r * x.inputs, from, quads, dots[r][h]);
    }
    for (int r = 0; r < count; ++r) {
      const int64_t at = (first + r) * groups + g;
      add<format>(w, dots[r], x.scale[at], x.start + 2 * at, total[r]);
    }
  }
  for (int r = 0; r < count; ++r)
    for (int i = 0; i < 4; ++i) {
      if (format == kW8) total[r][i] *= vld1q_f32((const float *)tile + 4 * i);
      vst1q_f32(out + r * stride + 4 * i, total[r][i]);
    }
}

template <int64_t format>
void multiplied(const uint8_t *tile, const Rows &x, int64_t first, int64_t rows, float *out,
                int64_t stride) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2)
    some<format, 2>(tile, x, first + row, out + row * stride, stride);
  for (; row < rows; ++row) some<format, 1>(tile, x, first + row, out + row * stride, stride);
}

}  // namespace

#include "in_turn.inl"

namespace cloister {
extern const Kernels KERNELS = {NAME,  quantize, norm,   gate, rotate,
                                tiles, unpack,   attend, join, store};
}
