// add_layer_norm on the CPU: the sum is kept in cache between its mean, its variance and its use.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "fxopt/kernels/native/norm.h"

namespace fxopt {
namespace {

template <typename T>
void add_and_normalize(const T* x, const T* residual, const compute_t<T>* weight,
                       const compute_t<T>* bias, double eps, int64_t rows, int64_t n, T* y) {
  using C = compute_t<T>;
  parallel_rows(rows, n, [&](int64_t first, int64_t last) {
    Buffer<C> sum(n);
    Buffer<C> scratch(n);
    for (int64_t m = first; m < last; ++m) {
      load_row(x + m * n, sum.get(), n);
      const C* other = as_compute(residual + m * n, scratch.get(), n);
      for (int64_t i = 0; i < n; ++i) sum[i] += other[i];
      layer_norm_row<C>(sum, weight, bias, eps, n, scratch);
      store_row(scratch.get(), y + m * n, n);
    }
  });
}

at::Tensor add_layer_norm(const at::Tensor& x, const at::Tensor& residual,
                          const at::Tensor& weight, const at::Tensor& bias, double eps) {
  FXOPT_CHECK(x.dim() >= 1 && x.sizes() == residual.sizes() &&
                  x.scalar_type() == residual.scalar_type(),
              "x and residual must have one shape and dtype, got ",
              c10::toString(x.scalar_type()), " ", x.sizes(), " and ",
              c10::toString(residual.scalar_type()), " ", residual.sizes());
  const at::Tensor input = x.contiguous();
  const at::Tensor other = residual.contiguous();
  at::Tensor y = at::empty(x.sizes(), input.options());
  const int64_t n = x.size(-1);
  dispatch_floating(x.scalar_type(), "x", [&](auto sample) {
    using T = decltype(sample);
    const Parameter<compute_t<T>> gain(weight, n, "weight");
    const Parameter<compute_t<T>> shift(bias, n, "bias");
    if (y.numel() == 0) return;
    add_and_normalize(input.const_data_ptr<T>(), other.const_data_ptr<T>(), gain.get(),
                      shift.get(), eps, y.numel() / n, n, y.mutable_data_ptr<T>());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("add_layer_norm", TORCH_FN(add_layer_norm)); }

}  // namespace fxopt
