// fused_rms_norm on the CPU: two passes over a row in cache, one rounding.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "fxopt/kernels/native/norm.h"

namespace fxopt {
namespace {

template <typename T>
void normalize_rows(const T* x, const compute_t<T>* weight, double eps, int64_t rows, int64_t n,
                    T* y) {
  using C = compute_t<T>;
  parallel_rows(rows, n, [&](int64_t first, int64_t last) {
    Buffer<C> scratch(n);
    Buffer<C> out(n);
    for (int64_t m = first; m < last; ++m) {
      const C* row = as_compute(x + m * n, scratch.get(), n);
      rms_norm_row<C>(row, weight, eps, n, out);
      store_row(out.get(), y + m * n, n);
    }
  });
}

at::Tensor fused_rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                          double eps) {
  FXOPT_CHECK(x.dim() >= 1, "fused_rms_norm needs a tensor [..., D], got a scalar");
  const at::Tensor input = x.contiguous();
  at::Tensor y = at::empty(x.sizes(), input.options());
  const int64_t n = x.size(-1);
  dispatch_floating(x.scalar_type(), "x", [&](auto sample) {
    using T = decltype(sample);
    const Parameter<compute_t<T>> gain(weight, n, "weight");
    if (y.numel() == 0) return;
    normalize_rows(input.const_data_ptr<T>(), gain.get(), eps, y.numel() / n, n,
                   y.mutable_data_ptr<T>());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("fused_rms_norm", TORCH_FN(fused_rms_norm)); }

}  // namespace fxopt
