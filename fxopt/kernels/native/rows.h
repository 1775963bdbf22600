// Operators that work on the last axis of floating tensors, row by row.
#pragma once

#include <ATen/Parallel.h>

#include "fxopt/kernels/native/buffer.h"
#include "fxopt/kernels/native/numeric.h"

namespace fxopt {

// Lanes of a running sum: enough independent chains for any vector width, and a fixed order of
// addition whatever the width.
constexpr int64_t kSumLanes = 32;

template <typename C, typename Term>
inline C sum_row(int64_t n, const Term& term) {
  C lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (int64_t j = 0; j < kSumLanes; ++j) lanes[j] += term(i + j);
  C sum = C(0);
  for (int64_t j = 0; j < kSumLanes; ++j) sum += lanes[j];
  for (; i < n; ++i) sum += term(i);
  return sum;
}

// A parameter of n elements in the compute type C; absent ones are left empty.
template <typename C>
class Parameter {
 public:
  Parameter(const std::optional<at::Tensor>& tensor, int64_t n, const char* what)
      : present_(tensor.has_value()), values_(present_ ? n : 0) {
    if (!present_) return;
    FXOPT_CHECK(tensor->numel() == n, what, " must have ", n, " elements, got ", tensor->sizes());
    const at::Tensor contiguous = tensor->contiguous();
    dispatch_floating(contiguous.scalar_type(), what, [&](auto sample) {
      using T = decltype(sample);
      const T* from = contiguous.const_data_ptr<T>();
      if constexpr (std::is_same_v<C, double> && !std::is_same_v<T, double>) {
        for (int64_t i = 0; i < n; ++i) values_[i] = static_cast<double>(from[i]);
      } else {
        load_row(from, values_.get(), n);
      }
    });
  }

  const C* get() const { return present_ ? values_.get() : nullptr; }

 private:
  bool present_;
  Buffer<C> values_;
};

// body(first, last) over rows of `width` elements, on all threads where there is enough to do.
template <typename Body>
inline void parallel_rows(int64_t rows, int64_t width, const Body& body) {
  at::parallel_for(0, rows, 16384 / (width + 1) + 1, body);
}

}  // namespace fxopt
