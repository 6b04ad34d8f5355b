// The time that each call of an operator took, kept while a switch is on.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace cloister {

// Of `linear` the number is its Input; `_executorch.py` has the same ones.
enum Operator : int64_t { kLinear = 0, kAttention = 4, kEmbedding = 5, kNorm = 6 };

struct Call {
  int64_t which;  // Operator
  int64_t nanoseconds;
};

// Written by the one thread that runs a program.
struct Profile {
  bool on = false;
  std::vector<Call> calls;
};

inline Profile profile;

// Times the scope that it stands in.
class Timer {
 public:
  explicit Timer(int64_t which) : which_(which) {
    if (profile.on) begin_ = now();
  }
  ~Timer() {
    if (profile.on) profile.calls.push_back({which_, now() - begin_});
  }
  Timer(const Timer &) = delete;
  Timer &operator=(const Timer &) = delete;

 private:
  static int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  }
  int64_t which_, begin_ = 0;
};

}  // namespace cloister
