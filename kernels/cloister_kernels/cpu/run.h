// The operators, each divided into tasks for a thread pool.
#pragma once

#include "kernels.h"

namespace cloister {

// Calls work(context, task) for each task, in any order, on any threads.
using Parallel = void (*)(void (*work)(void *context, int64_t task), void *context, int64_t tasks);

enum Input : int64_t { kPlain = 0, kNormed = 1, kGatedSilu = 2, kGatedGelu = 3 };

// out[M, N] = f(x) W + bias + residual. f: nothing, a norm, or act(left half) * right half of x.
struct Linear {
  const float *x;        // [M, K], gated [M, 2 K]
  int64_t rows, inputs;  // M, K
  int64_t input;
  const float *norm;  // [K]
  float eps;
  bool whole;  // one activation scale for a row
  const uint8_t *weights;
  int64_t format, outputs;  // N
  const float *bias;        // [N] or null
  const float *residual;    // [M, N] or null
  float *out;
};

struct Attention {
  const float *qkv;               // [T, (H + 2 G) D]
  int64_t length, start;          // T
  int64_t heads, kv_heads, size;  // H, G, D
  const float *cos, *sin;         // [context, D], null: none
  const float *q_norm, *k_norm;   // [D] or null
  float eps, scale, softcap;
  int64_t window;  // 0: none
  int64_t cache;   // what the caches hold
  void *k, *v;     // [C, G, head_bytes]
  float *out;      // [T, H, D]
};

void linear(const Kernels &kernels, const Linear &work, Parallel parallel, int64_t threads);
void attention(const Kernels &kernels, const Attention &work, Parallel parallel, int64_t threads);

}  // namespace cloister
