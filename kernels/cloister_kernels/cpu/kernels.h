// What each instruction set implements, and how packed weights lie in memory.
//
// M rows of activations, N rows of weights (outputs), K inputs.
//
// Files that are compiled for one instruction set hold no inline function with external linkage and
// no template of the standard library: the linker keeps one copy of such, maybe the one that this
// processor cannot run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cloister {

constexpr int64_t kTile = 16;    // weight rows that lie side by side
constexpr int64_t kGroup = 32;   // inputs with one activation scale, padded with zeros
constexpr int64_t kSuper = 256;  // inputs of a block of the types Q4_K and Q6_K

// A weight is scale * (u - zero) - minimum, u unsigned. A tile has for each group of inputs the
// scales of its 16 rows, then their minima, then the integers: 4 inputs of each row side by side,
// in nibbles inputs 8j to 8j+3 low and 8j+4 to 8j+7 high.
enum Format : int64_t {
  kW4 = 0,    // nibbles, zero 8, bfloat16 scales
  kW8 = 1,    // bytes, zero 128, float32 scales of whole rows, before the tile's groups
  kQ4_0 = 2,  // GGUF's: nibbles, zero 8, float16 scales
  kQ4_1 = 3,  // nibbles, zero 0, float16 scales and minima (negated)
  kQ8_0 = 4,  // bytes, zero 128, float16 scales
  kQ4_K = 5,  // nibbles; for 256 inputs float16 scale and minimum, for each 32 a byte times these
  kQ6_K = 6,  // 6 bits, zero 32; for 256 inputs a float16 scale, for each 16 a signed byte times it
  kFormats = 7,
};

// How many of `left` to take next, at most `most`, so that the last is not left with few.
static constexpr int64_t even(int64_t left, int64_t most) {
  const int64_t parts = (left + most - 1) / most;
  return (left + parts - 1) / parts;
}

// Bytes of one tile; 0 for an unknown format, or for inputs that it cannot hold.
int64_t tile_bytes(int64_t format, int64_t inputs);

// Rows of activations in 8 bits. K is padded to whole groups.
struct Rows {
  const int8_t *q;       // [M, K]
  const float *scale;    // [M, K / 32]
  const int32_t *start;  // [M, K / 16]: see `settle`
  int64_t inputs;        // K
};

// What attention of some rows has summed so far.
struct Sums {
  float *out;           // [rows, D], of values, not normalized
  float *most, *total;  // [rows]: largest score, sum of exponentials
};

constexpr int kBlock = 64;  // positions that `attend` takes at a time

// Floats of space that `attend` needs: a block's keys turned, and the scores of a few rows.
inline int64_t attend_space(int64_t size) { return (size + 4) * kBlock; }

// Attention of some new positions of one KV head over a range of its cache.
struct Attend {
  const float *q;        // [rows, D], scaled
  const int64_t *last;   // [rows]: the last position that each may see
  const int64_t *first;  // [rows]: the first one
  int64_t rows, size;    // D, a multiple of 16
  const void *k, *v;     // position 0 of this head
  int64_t stride;        // bytes from one position to the next
  int64_t begin, end;    // positions
  float softcap;         // 0: none
  Sums sums;             // what is added to
  float *space;          // attend_space(D) floats
};

// What a cache holds of a head at a position: D entries; of 8 bits a float32 scale behind them.
enum Cache : int64_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };

inline int64_t head_bytes(int64_t cache, int64_t size) {
  return cache == kFloat32 ? 4 * size : cache == kFloat16 ? 2 * size : size + 4;
}

enum Activation : int64_t { kSilu = 0, kGelu = 1 };

struct Kernels {
  const char *name;
  // Round a row to 8 bits; `whole` for one scale for the row. Not finite entries: a scale of NaN.
  void (*quantize)(const float *x, int64_t inputs, bool whole, int8_t *q, float *scale,
                   int32_t *sum);
  void (*norm)(const float *x, const float *weight, float eps, int64_t size, float *out);
  void (*gate)(const float *gate, const float *up, int64_t size, int64_t activation, float *out);
  // Rotate the pairs of a head, D / 2 entries apart: out [D], which may be x; cos and sin [D].
  void (*rotate)(const float *x, const float *cos, const float *sin, int64_t size, float scale,
                 float *out);
  // Multiply rows by `count` tiles of weights, 1 or 2: out [rows, 16 * count] of `stride`.
  void (*tiles)(int64_t format, const uint8_t *weights, int64_t count, const Rows &x, int64_t first,
                int64_t rows, float *out, int64_t stride);
  void (*unpack)(int64_t format, const uint8_t *weights, int64_t inputs, int64_t row, float *out);
  void (*attend)(const Attend &work, int64_t cache);
  // Add sums over other positions.
  void (*join)(const Sums &from, int64_t rows, int64_t size, const Sums &to);
  void (*store)(const float *x, int64_t size, int64_t cache, void *out);
};

// The fastest that this processor runs, or the one called `name`; null where it cannot.
const Kernels *kernels(const char *name = nullptr);

}  // namespace cloister
