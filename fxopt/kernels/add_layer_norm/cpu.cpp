// add_layer_norm on the CPU: the sum is kept in cache between its mean, its variance and its use.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "fxopt/kernels/native/rows.h"

namespace fxopt {
namespace {

template <typename C>
void normalize_row(const C* sum, const C* weight, const C* bias, double eps, int64_t n, C* out) {
  const C mean = sum_row<C>(n, [&](int64_t i) { return sum[i]; }) / C(n);
  const C squares =
      sum_row<C>(n, [&](int64_t i) { return (sum[i] - mean) * (sum[i] - mean); });
  const C factor = C(1) / std::sqrt(squares / C(n) + C(eps));
  for (int64_t i = 0; i < n; ++i) out[i] = (sum[i] - mean) * factor * weight[i] + bias[i];
}

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
      normalize_row(sum.get(), weight, bias, eps, n, scratch.get());
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
