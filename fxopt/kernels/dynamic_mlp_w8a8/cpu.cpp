// dynamic_mlp_w8a8 on the CPU: the activation is the first product's epilogue, and what it gives is
// quantized in cache for the second.
#include <torch/library.h>

#include "fxopt/kernels/native/feed_forward.h"

namespace fxopt {
namespace {

at::Tensor dynamic_mlp_w8a8(const at::Tensor& x, const at::Tensor& up_weight,
                            const at::Tensor& up_scale, const std::optional<at::Tensor>& up_sum,
                            const std::optional<at::Tensor>& up_bias,
                            const at::Tensor& down_weight, const at::Tensor& down_scale,
                            const std::optional<at::Tensor>& down_sum,
                            const std::optional<at::Tensor>& down_bias,
                            c10::string_view activation,
                            const std::optional<at::Tensor>& pre_scale,
                            const std::optional<at::Tensor>& down_pre_scale) {
  const Activation act = parse_activation(activation);
  FXOPT_CHECK(x.dim() >= 1, "dynamic_mlp_w8a8 needs a tensor [..., K], got a scalar");
  check_floating(x.scalar_type(), "x");
  check_weight(up_weight, up_scale, up_bias, x.size(-1));
  check_weight_sum(up_sum, up_weight);
  const int64_t f = up_weight.size(0);
  check_weight(down_weight, down_scale, down_bias, f);
  check_weight_sum(down_sum, down_weight);
  const Parameter<float> factors(pre_scale, x.size(-1), "pre_scale");
  const Parameter<float> down_factors(down_pre_scale, f, "down_pre_scale");
  const int64_t n = down_weight.size(0);
  at::Tensor y = empty_like_rows(x, n, x.scalar_type());
  if (y.numel() == 0) return y;
  const WeightView up_parts(up_weight, up_scale, up_sum, up_bias);
  const WeightView down_parts(down_weight, down_scale, down_sum, down_bias);
  const Int8Weight up = up_parts.view();
  const auto hidden = [&](const QuantizedRows& a, float* out) {
    linear_rows(a, up, act, {out, f, at::kFloat});
  };
  feed_forward(as_matrix(x), y.numel() / n, x.scalar_type(),
               {up, down_parts.view(), factors.get(), down_factors.get()}, hidden,
               y.mutable_data_ptr());
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("dynamic_mlp_w8a8", TORCH_FN(dynamic_mlp_w8a8)); }

}  // namespace fxopt
