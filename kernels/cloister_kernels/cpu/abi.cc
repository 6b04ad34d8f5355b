// The operators for callers that are not ExecuTorch: tests, fuzzers and benchmarks.
#include <atomic>
#include <thread>
#include <vector>

#include "run.h"

using namespace cloister;

namespace {

thread_local int64_t threads = 1;

void spread(void (*work)(void *context, int64_t task), void *context, int64_t tasks) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t task; (task = next++) < tasks;) work(context, task);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(run);
  run();
  for (auto &other : others) other.join();
}

}  // namespace

extern "C" {

int cloister_runs(const char *set) { return kernels(set) != nullptr; }

const char *cloister_best() { return kernels()->name; }

int64_t cloister_tile_bytes(int64_t format, int64_t inputs) { return tile_bytes(format, inputs); }

void cloister_linear(const char *set, const Linear *work, int64_t with_threads) {
  threads = with_threads;
  linear(*kernels(set), *work, spread, threads);
}

void cloister_attention(const char *set, const Attention *work, int64_t with_threads) {
  threads = with_threads;
  attention(*kernels(set), *work, spread, threads);
}

void cloister_unpack(const char *set, int64_t format, const uint8_t *weights, int64_t inputs,
                     int64_t row, float *out) {
  kernels(set)->unpack(format, weights + row / kTile * tile_bytes(format, inputs), inputs,
                       row % kTile, out);
}
}
