// dynamic_gated_mlp_w8a8 on the CPU: a panel is 32 gate columns beside their 32 up columns, so that
// the product of the two is taken in cache; the hidden rows are then quantized and go down.
#include <torch/library.h>

#include "fxopt/kernels/native/feed_forward.h"

namespace fxopt {
namespace {

constexpr int64_t kHalf = kPanel / 2;

// hidden[m][f] = activation(gate[m][f]) * up[m][f], in float32.
void gate_up(const QuantizedRows& a, const Int8Weight& weight, Activation activation,
             float* hidden) {
  const int64_t f = weight.n / 2;
  const auto columns_of = [&](int64_t panel) { return std::min(kHalf, f - panel * kHalf); };
  const auto panel_rows = [&](int64_t panel, const int8_t** w) {
    const int64_t count = columns_of(panel);
    const int8_t* gate = weight.data + panel * kHalf * weight.k;
    for (int64_t j = 0; j < count; ++j) {
      w[j] = gate + j * weight.k;
      w[count + j] = gate + (f + j) * weight.k;
    }
    return 2 * count;
  };
  const auto epilogue = [&](int64_t panel) {
    const int64_t count = columns_of(panel);
    const int64_t column = panel * kHalf;
    PanelParameters parameters;
    parameters.load(weight, 0, column, count);
    parameters.load(weight, count, f + column, count);
    return [=, &a](int64_t row, int64_t rows, const int32_t* acc) {
      alignas(64) float values[kTileRows * kPanel];
      parameters.dequantize(a, row, rows, acc, values, kPanel);
      for (int64_t r = 0; r < rows; ++r) {
        float* gate = values + r * kPanel;
        const float* up = gate + count;
        float* out = hidden + (row + r) * f + column;
        activate(activation, gate, count);
        for (int64_t j = 0; j < count; ++j) out[j] = gate[j] * up[j];
      }
    };
  };
  int8_gemm(a.q, (f + kHalf - 1) / kHalf, panel_rows, epilogue);
}

at::Tensor dynamic_gated_mlp_w8a8(const at::Tensor& x, const at::Tensor& gate_up_weight,
                                  const at::Tensor& gate_up_scale,
                                  const std::optional<at::Tensor>& gate_up_sum,
                                  const std::optional<at::Tensor>& gate_up_bias,
                                  const at::Tensor& down_weight, const at::Tensor& down_scale,
                                  const std::optional<at::Tensor>& down_sum,
                                  const std::optional<at::Tensor>& down_bias,
                                  c10::string_view activation,
                                  const std::optional<at::Tensor>& pre_scale,
                                  const std::optional<at::Tensor>& down_pre_scale) {
  const Activation act = parse_activation(activation);
  FXOPT_CHECK(x.dim() >= 1, "dynamic_gated_mlp_w8a8 needs a tensor [..., K], got a scalar");
  check_floating(x.scalar_type(), "x");
  check_weight(gate_up_weight, gate_up_scale, gate_up_bias, x.size(-1));
  check_weight_sum(gate_up_sum, gate_up_weight);
  FXOPT_CHECK(gate_up_weight.size(0) % 2 == 0,
              "gate_up_weight must have the gate rows and then as many up rows, got ",
              gate_up_weight.sizes());
  const int64_t f = gate_up_weight.size(0) / 2;
  check_weight(down_weight, down_scale, down_bias, f);
  check_weight_sum(down_sum, down_weight);
  const Parameter<float> factors(pre_scale, x.size(-1), "pre_scale");
  const Parameter<float> down_factors(down_pre_scale, f, "down_pre_scale");
  const int64_t n = down_weight.size(0);
  const at::ScalarType dtype = x.scalar_type();
  at::Tensor y = empty_like_rows(x, n, dtype);
  if (y.numel() == 0) return y;
  const WeightView up_parts(gate_up_weight, gate_up_scale, gate_up_sum, gate_up_bias);
  const WeightView down_parts(down_weight, down_scale, down_sum, down_bias);
  const Int8Weight up = up_parts.view();
  const auto hidden = [&](const QuantizedRows& a, float* out) { gate_up(a, up, act, out); };
  feed_forward(as_matrix(x), y.numel() / n, dtype,
               {up, down_parts.view(), factors.get(), down_factors.get()}, hidden,
               y.mutable_data_ptr());
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) {
  m.impl("dynamic_gated_mlp_w8a8", TORCH_FN(dynamic_gated_mlp_w8a8));
}

}  // namespace fxopt
