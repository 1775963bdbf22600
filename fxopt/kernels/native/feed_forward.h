// down(quantize(hidden(quantize(x)))): two linears on rows quantized per token, some rows at a time,
// so that what lies between them is written and read in cache.
#pragma once

#include "fxopt/kernels/native/linear.h"

namespace fxopt {

// Hidden values (float32) of a task: few enough to stay in cache. Every task packs the weights anew,
// which fewer than kTaskRows rows are not worth (measured).
constexpr int64_t kHiddenBytes = 3 << 19;
constexpr int64_t kTaskRows = 192;
// Rows at a time where there are too few for a task on each thread: their products are shared.
constexpr int64_t kSharedRows = 1024;

struct FeedForward {
  Int8Weight up;
  Int8Weight down;
  const float* pre_scale;       // [up.k] or null
  const float* down_pre_scale;  // [down.k] or null
};

// Rows that go through both linears together.
inline int64_t feed_forward_rows(int64_t m, int64_t width) {
  const int64_t threads = at::get_num_threads();
  if (m < threads * kTaskRows) return std::min(m, kSharedRows);
  const int64_t fitting = std::clamp<int64_t>(kHiddenBytes / (4 * width + 1), kTaskRows, 384);
  const int64_t tasks = std::max(threads, m / fitting / threads * threads);
  return round_up((m + tasks - 1) / tasks, kTileRows);
}

// hidden(rows, out) writes the hidden values [rows.m, down.k] of quantized rows, in float32. Within a
// task its loops run on one thread; where there is one task, on all.
template <typename Hidden>
void feed_forward(const Matrix& x, int64_t m, at::ScalarType dtype, const FeedForward& parts,
                  const Hidden& hidden, void* y) {
  const int64_t width = parts.down.k;
  const int64_t chunk = feed_forward_rows(m, width);
  const int64_t size = c10::elementSize(dtype);
  const auto* from = static_cast<const char*>(x.data);
  auto* to = static_cast<char*>(y);
  const auto some_rows = [&](int64_t first, int64_t rows, float* values) {
    TokenQuantized input(rows, x.k, parts.up.sum != nullptr);
    input.quantize(from + first * x.ld * size, dtype, x.ld, parts.pre_scale);
    hidden(input.rows(), values);
    TokenQuantized middle(rows, width, parts.down.sum != nullptr);
    middle.quantize(values, at::kFloat, width, parts.down_pre_scale);
    const int64_t n = parts.down.n;
    linear_rows(middle.rows(), parts.down, Activation::none, {to + first * n * size, n, dtype});
  };
  const int64_t tasks = (m + chunk - 1) / chunk;
  const bool shared = m < at::get_num_threads() * kTaskRows;
  at::parallel_for(0, tasks, shared ? tasks : 1, [&](int64_t first, int64_t last) {
    Buffer<float> values(chunk * width);
    for (int64_t task = first; task < last; ++task) {
      const int64_t start = task * chunk;
      some_rows(start, std::min(chunk, m - start), values);
    }
  });
}

}  // namespace fxopt
