// quantize_per_token on the CPU: one pass for the maximum, one for the integers, row by row.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "fxopt/kernels/native/linear.h"

namespace fxopt {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize_per_token(const at::Tensor& x,
                                                      const std::optional<at::Tensor>& pre_scale) {
  FXOPT_CHECK(x.dim() >= 1, "quantize_per_token needs a tensor [..., K], got a scalar");
  check_floating(x.scalar_type(), "x");
  const Parameter<float> factors(pre_scale, x.size(-1), "pre_scale");
  at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  at::Tensor scale = empty_like_rows(x, 1, at::kFloat);
  if (x.size(-1) == 0) {
    scale.fill_(std::numeric_limits<float>::min());
    return {q, scale};
  }
  const Matrix rows = as_matrix(x);
  quantize_matrix(rows.data, x.scalar_type(), rows.ld, rows.m, rows.k, factors.get(),
                  q.mutable_data_ptr<int8_t>(), rows.k, scale.mutable_data_ptr<float>(), nullptr,
                  nullptr);
  return {q, scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("quantize_per_token", TORCH_FN(quantize_per_token)); }

}  // namespace fxopt
