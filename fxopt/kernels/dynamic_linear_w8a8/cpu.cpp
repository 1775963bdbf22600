// dynamic_linear_w8a8 on the CPU: quantize, product and epilogue in one call.
#include <torch/library.h>

#include "fxopt/kernels/native/linear.h"

namespace fxopt {
namespace {

at::Tensor dynamic_linear_w8a8(const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& weight_scale,
                               const std::optional<at::Tensor>& weight_sum,
                               const std::optional<at::Tensor>& bias,
                               c10::string_view activation,
                               const std::optional<at::Tensor>& pre_scale) {
  const Activation act = parse_activation(activation);
  FXOPT_CHECK(x.dim() >= 1, "dynamic_linear_w8a8 needs a tensor [..., K], got a scalar");
  check_floating(x.scalar_type(), "x");
  check_weight(weight, weight_scale, bias, x.size(-1));
  check_weight_sum(weight_sum, weight);
  const Parameter<float> factors(pre_scale, x.size(-1), "pre_scale");
  at::Tensor y = empty_like_rows(x, weight.size(0), x.scalar_type());
  if (y.numel() == 0) return y;
  Matrix rows = as_matrix(x);
  rows.m = y.numel() / weight.size(0);
  TokenQuantized quantized(rows.m, rows.k, weight_sum.has_value());
  quantized.quantize(rows.data, x.scalar_type(), rows.ld, factors.get());
  const WeightView parts(weight, weight_scale, weight_sum, bias);
  linear_rows(quantized.rows(), parts.view(), act,
              {y.mutable_data_ptr(), weight.size(0), x.scalar_type()});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("dynamic_linear_w8a8", TORCH_FN(dynamic_linear_w8a8)); }

}  // namespace fxopt
