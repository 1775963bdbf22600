// Layer and root-mean-square normalization of a row in cache.
#pragma once

#include <cmath>

#include "fxopt/kernels/native/rows.h"

namespace fxopt {

// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; weight and bias may be null.
template <typename C>
inline void layer_norm_row(const C* __restrict x, const C* weight, const C* bias, double eps,
                           int64_t n, C* __restrict out) {
  const C mean = sum_row<C>(n, [&](int64_t i) { return x[i]; }) / C(n);
  const C squares = sum_row<C>(n, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  const C factor = C(1) / std::sqrt(squares / C(n) + C(eps));
  if (weight != nullptr && bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * factor;
  if (weight != nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] *= weight[i];
  if (bias != nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] += bias[i];
}

// out = x / sqrt(mean(x^2) + eps) * weight; weight may be null.
template <typename C>
inline void rms_norm_row(const C* __restrict x, const C* weight, double eps, int64_t n,
                         C* __restrict out) {
  const C squares = sum_row<C>(n, [&](int64_t i) { return x[i] * x[i]; });
  const C factor = C(1) / std::sqrt(squares / C(n) + C(eps));
  if (weight != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
  }
}

}  // namespace fxopt
