// int8 quantization of rows, each x multiplied by a scale per channel first where there is one.
//   symmetric:  scale = max(max(|x|) / 127, tiny), q = round_half_even(x / scale);
//   asymmetric: low = min(0, min x), high = max(0, max x), scale = max((high - low) / 255, tiny),
//               zero_point = -128 - round_half_even(low / scale),
//               q = clamp(round_half_even(x / scale) + zero_point, -128, 127).
#pragma once

#include <ATen/Parallel.h>

#include <limits>

#include "fxopt/kernels/native/buffer.h"
#include "fxopt/kernels/native/numeric.h"

namespace fxopt {

// As integers, the bits of non-negative floats sort like the floats, with infinity and then NaN on
// top: the maximum sees every non-finite value, which a float maximum would lose.
inline float absmax_row(const float* __restrict x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = bits_as<int32_t>(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return bits_as<float>(largest);
}

// Writes q[0..n) and the scale, and returns the sum of q. A row that is not finite quantizes to
// zeros with a scale that is not finite, so that whatever is computed from it is NaN.
inline int32_t quantize_row(const float* __restrict x, int64_t n, int8_t* __restrict q,
                            float* scale) {
  const float absmax = absmax_row(x, n);
  float s = absmax / 127.0f;
  s = s < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : s;
  *scale = s;
  if (!(absmax <= std::numeric_limits<float>::max())) {
    std::memset(q, 0, n);
    return 0;
  }
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<int32_t>(std::rint(x[i] / s));
    q[i] = static_cast<int8_t>(v);
    sum += v;
  }
  return sum;
}

// The asymmetric variant: fxopt::choose_qparams and fxopt::quantize over [-128, 127], to the bit.
// The larger of integers that start at zero is the largest positive float, or a NaN, which sorts on
// top; with the sign flipped the same finds the least negative.
inline int32_t quantize_row(const float* __restrict x, int64_t n, int8_t* __restrict q,
                            float* scale, int32_t* zero_point) {
  int32_t above = 0;
  int32_t below = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = bits_as<int32_t>(x[i]);
    const int32_t flipped = bits ^ std::numeric_limits<int32_t>::min();
    above = bits > above ? bits : above;
    below = flipped > below ? flipped : below;
  }
  const float low = -bits_as<float>(below);
  float s = (bits_as<float>(above) - low) / 255.0f;
  if (!(s <= std::numeric_limits<float>::max())) {
    *scale = s;
    *zero_point = 0;
    std::memset(q, 0, n);
    return 0;
  }
  s = s < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : s;
  const int32_t zero = -128 - static_cast<int32_t>(std::rint(low / s));
  *scale = s;
  *zero_point = zero;
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t v = static_cast<int32_t>(std::rint(x[i] / s)) + zero;
    v = v < -128 ? -128 : v;
    v = v > 127 ? 127 : v;
    q[i] = static_cast<int8_t>(v);
    sum += v;
  }
  return sum;
}

// x * pre_scale in float32: x itself where it is that already, else scratch, which stays in cache.
template <typename T>
inline const float* scaled_row(const T* x, const float* __restrict pre_scale,
                               float* __restrict scratch, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    if (pre_scale == nullptr) return x;
    for (int64_t i = 0; i < n; ++i) scratch[i] = x[i] * pre_scale[i];
  } else {
    load_row(x, scratch, n);
    if (pre_scale == nullptr) return scratch;
    for (int64_t i = 0; i < n; ++i) scratch[i] *= pre_scale[i];
  }
  return scratch;
}

// Rows [first, last) of x (row stride ldx) into q (row stride ldq, padded with zeros to ldq);
// asymmetric where there is room for zero points.
template <typename T>
inline void quantize_rows(const T* x, int64_t ldx, int64_t k, const float* pre_scale,
                          int64_t first, int64_t last, int8_t* q, int64_t ldq, float* scale,
                          int32_t* sum, int32_t* zero_point) {
  Buffer<float> scratch(std::is_same_v<T, float> && pre_scale == nullptr ? 0 : k);
  for (int64_t m = first; m < last; ++m) {
    const float* row = scaled_row(x + m * ldx, pre_scale, scratch.get(), k);
    int8_t* q_row = q + m * ldq;
    const int32_t total = zero_point == nullptr
                              ? quantize_row(row, k, q_row, scale + m)
                              : quantize_row(row, k, q_row, scale + m, zero_point + m);
    std::memset(q_row + k, 0, ldq - k);
    if (sum != nullptr) sum[m] = total;
  }
}

// The same for all rows, on all threads where there is enough to do.
inline void quantize_matrix(const void* x, at::ScalarType dtype, int64_t ldx, int64_t m, int64_t k,
                            const float* pre_scale, int8_t* q, int64_t ldq, float* scale,
                            int32_t* sum, int32_t* zero_point) {
  const int64_t grain = 32768 / (k + 1) + 1;
  dispatch_floating(dtype, "x", [&](auto sample) {
    using T = decltype(sample);
    at::parallel_for(0, m, grain, [&](int64_t first, int64_t last) {
      quantize_rows(static_cast<const T*>(x), ldx, k, pre_scale, first, last, q, ldq, scale, sum,
                    zero_point);
    });
  });
}

}  // namespace fxopt
