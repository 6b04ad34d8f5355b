// Plain C++, for processors without one of the other sets, and to check the others by.
#include "shared.inl"

namespace {

template <int64_t format>
void multiplied(const uint8_t *tile, const Rows &x, int64_t first, int64_t rows, float *out,
                int64_t stride) {
  using L = Layout<format>;
  const int64_t groups = x.inputs / kGroup;
  for (int64_t row = first; row < first + rows; ++row, out += stride) {
    for (int64_t n = 0; n < kTile; ++n) out[n] = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t *q = x.q + row * x.inputs + g * kGroup;
      const float scale = x.scale[row * groups + g];
      const int32_t *start = x.start + (row * groups + g) * 2;
      for (int64_t n = 0; n < kTile; ++n) {
        int32_t dot[2] = {start[0], L::kHalves ? start[1] : 0};
        for (int64_t k = 0; k < kGroup; ++k) dot[k / 16] += L::integer(tile, g, n, k) * q[k];
        if (L::kHalves) {
          out[n] += scale * (L::scale(tile, g, 0, n) * float(dot[0]) +
                             L::scale(tile, g, 1, n) * float(dot[1]));
        } else {
          out[n] += scale * (L::scale(tile, g, 0, n) * float(dot[0] + dot[1]) -
                             L::minimum(tile, g, n) * float(start[1]));
        }
      }
    }
  }
}

}  // namespace

#include "in_turn.inl"

namespace cloister {
extern const Kernels kPortable = {"portable", quantize, norm,   gate, rotate,
                                  tiles,      unpack,   attend, join, store};
}
