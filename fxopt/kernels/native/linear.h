// y = activation(scale * weight_scale * (q - zero_point) @ w.T + bias), the epilogue in cache.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "fxopt/kernels/native/int8_gemm.h"
#include "fxopt/kernels/native/quantize.h"
#include "fxopt/kernels/native/rows.h"

namespace fxopt {

// Quantized activations: q, and per row (step 1) or for all rows (step 0) the scale.
struct QuantizedRows {
  Rows q;
  const float* scale;
  int64_t scale_step;
  const int32_t* row_sum;     // [m]
  const int32_t* zero_point;  // like scale, or null
};

struct Int8Weight {
  const int8_t* data;  // [n, k]
  const float* scale;  // [n]
  const int32_t* sum;  // [n], needed where there is a zero point
  const void* bias;    // [n] of bias_dtype, or null
  at::ScalarType bias_dtype;
  int64_t n;
  int64_t k;
};

struct Destination {
  void* data;
  int64_t ld;
  at::ScalarType dtype;
};

inline void load_bias(const Int8Weight& weight, int64_t first, int64_t count, float* bias) {
  dispatch_floating(weight.bias_dtype, "bias", [&](auto sample) {
    load_row(static_cast<const decltype(sample)*>(weight.bias) + first, bias, count);
  });
}

// The parameters of the columns of a panel; columns that do not exist have zeros, which makes every
// loop over a panel one of constant length.
class PanelParameters {
 public:
  // Columns [slot, slot + count) of the panel are rows [first, first + count) of the weight.
  void load(const Int8Weight& weight, int64_t slot, int64_t first, int64_t count) {
    std::memcpy(scale_ + slot, weight.scale + first, count * sizeof(float));
    if (weight.bias != nullptr) load_bias(weight, first, count, bias_ + slot);
    if (weight.sum != nullptr)
      std::memcpy(sum_ + slot, weight.sum + first, count * sizeof(int32_t));
  }

  // out[r][j] = scale * weight_scale * (acc - offsets) + bias, before the activation.
  void dequantize(const QuantizedRows& a, int64_t row, int64_t rows, const int32_t* acc,
                  float* out, int64_t ld) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = row + r;
      const float scale = a.scale[m * a.scale_step];
      const int32_t offset = kOffset * a.row_sum[m];
      const int32_t zero_point = a.zero_point == nullptr ? 0 : a.zero_point[m * a.scale_step];
      dequantize_row(acc + r * kPanel, offset, zero_point, scale, out + r * ld);
    }
  }

 private:
  void dequantize_row(const int32_t* __restrict acc, int32_t offset, int32_t zero_point,
                      float scale, float* __restrict out) const {
    if (zero_point == 0) {
      for (int64_t j = 0; j < kPanel; ++j)
        out[j] = static_cast<float>(acc[j] - offset) * (scale * scale_[j]) + bias_[j];
    } else {
      for (int64_t j = 0; j < kPanel; ++j)
        out[j] = static_cast<float>(acc[j] - offset - zero_point * sum_[j]) *
                     (scale * scale_[j]) +
                 bias_[j];
    }
  }

  alignas(64) float scale_[kPanel] = {};
  alignas(64) float bias_[kPanel] = {};
  alignas(64) int32_t sum_[kPanel] = {};
};

inline void store_tile(const float* values, int64_t row, int64_t rows, int64_t column,
                       int64_t count, const Destination& y) {
  dispatch_floating(y.dtype, "dtype", [&](auto sample) {
    auto* out = static_cast<decltype(sample)*>(y.data) + row * y.ld + column;
    for (int64_t r = 0; r < rows; ++r) store_row(values + r * kPanel, out + r * y.ld, count);
  });
}

inline void linear_rows(const QuantizedRows& a, const Int8Weight& weight, Activation activation,
                        const Destination& y) {
  const auto columns_of = [&](int64_t panel) {
    return std::min(kPanel, weight.n - panel * kPanel);
  };
  const auto panel_rows = [&](int64_t panel, const int8_t** w) {
    const int64_t count = columns_of(panel);
    for (int64_t j = 0; j < count; ++j) w[j] = weight.data + (panel * kPanel + j) * weight.k;
    return count;
  };
  const auto epilogue = [&](int64_t panel) {
    const int64_t count = columns_of(panel);
    const int64_t column = panel * kPanel;
    PanelParameters parameters;
    parameters.load(weight, 0, column, count);
    // Numbers that are ready go straight to y.
    const bool direct =
        count == kPanel && y.dtype == at::kFloat && activation == Activation::none;
    return [=, &a, &y](int64_t row, int64_t rows, const int32_t* acc) {
      if (direct) {
        float* out = static_cast<float*>(y.data) + row * y.ld + column;
        return parameters.dequantize(a, row, rows, acc, out, y.ld);
      }
      alignas(64) float values[kTileRows * kPanel];
      parameters.dequantize(a, row, rows, acc, values, kPanel);
      activate(activation, values, rows * kPanel);
      if (count == kPanel) {  // a constant length becomes straight code
        store_tile(values, row, rows, column, kPanel, y);
      } else {
        store_tile(values, row, rows, column, count, y);
      }
    };
  };
  int8_gemm(a.q, (weight.n + kPanel - 1) / kPanel, panel_rows, epilogue);
}

// Rows quantized per token, with the memory they live in.
class TokenQuantized {
 public:
  TokenQuantized(int64_t m, int64_t k, bool asymmetric)
      : lda_(round_up(k, 64)),
        m_(m),
        k_(k),
        asymmetric_(asymmetric),
        q_(m * lda_),
        scale_(m),
        sum_(m),
        zero_point_(asymmetric ? m : 0) {}

  void quantize(const void* x, at::ScalarType dtype, int64_t ldx, const float* pre_scale) {
    quantize_matrix(x, dtype, ldx, m_, k_, pre_scale, q_, lda_, scale_, sum_, zero_point());
  }

  QuantizedRows rows() const { return {{q_, lda_, m_, k_}, scale_, 1, sum_, zero_point()}; }

 private:
  int32_t* zero_point() const { return asymmetric_ ? zero_point_.get() : nullptr; }

  int64_t lda_, m_, k_;
  bool asymmetric_;
  Buffer<int8_t> q_;
  Buffer<float> scale_;
  Buffer<int32_t> sum_, zero_point_;
};

// ---- tensors ----

// x as rows [m, k] whose last axis is contiguous; copies only where the strides allow no view.
struct Matrix {
  at::Tensor keep;
  const void* data;
  int64_t m;
  int64_t k;
  int64_t ld;
};

inline Matrix as_matrix(const at::Tensor& x) {
  const int64_t k = x.size(-1);
  const int64_t m = k == 0 ? 0 : x.numel() / k;
  if (x.is_contiguous()) return {x, x.const_data_ptr(), m, k, k};
  const at::Tensor rows = k == 0 ? x : x.reshape({m, k});
  if (k != 0 && (rows.stride(1) == 1 || k == 1)) {
    return {rows, rows.const_data_ptr(), m, k, m <= 1 ? k : rows.stride(0)};
  }
  const at::Tensor copy = x.contiguous();
  return {copy, copy.const_data_ptr(), m, k, k};
}

inline void check_bias(const std::optional<at::Tensor>& bias, int64_t n) {
  if (!bias.has_value()) return;
  FXOPT_CHECK(bias->numel() == n, "bias must have N = ", n, " elements, got ", bias->sizes());
  check_floating(bias->scalar_type(), "bias");
}

inline void check_weight(const at::Tensor& weight, const at::Tensor& scale,
                         const std::optional<at::Tensor>& bias, int64_t k) {
  FXOPT_CHECK(weight.scalar_type() == at::kChar && weight.dim() == 2,
              "weight must be int8 [N, K], got ", c10::toString(weight.scalar_type()), " ",
              weight.sizes());
  FXOPT_CHECK(weight.size(1) == k, "weight is ", weight.sizes(), ", but the input has K = ", k);
  FXOPT_CHECK(scale.scalar_type() == at::kFloat && scale.numel() == weight.size(0),
              "weight_scale must be float32 with N = ", weight.size(0), " elements, got ",
              c10::toString(scale.scalar_type()), " ", scale.sizes());
  check_bias(bias, weight.size(0));
}

inline void check_weight_sum(const std::optional<at::Tensor>& sum, const at::Tensor& weight) {
  if (!sum.has_value()) return;
  FXOPT_CHECK(sum->scalar_type() == at::kInt && sum->numel() == weight.size(0),
              "weight_sum must be int32 with N = ", weight.size(0),
              " elements, the row sums of weight, got ", c10::toString(sum->scalar_type()), " ",
              sum->sizes());
}

// Contiguous versions of the parts of a weight, kept alive, and the view of them.
class WeightView {
 public:
  WeightView(const at::Tensor& weight, const at::Tensor& scale,
             const std::optional<at::Tensor>& sum, const std::optional<at::Tensor>& bias)
      : weight_(weight.expect_contiguous()), scale_(scale.expect_contiguous()) {
    if (sum.has_value()) sum_ = sum->contiguous();
    if (bias.has_value()) bias_ = bias->contiguous();
  }

  Int8Weight view() const {
    return {weight_->const_data_ptr<int8_t>(),
            scale_->const_data_ptr<float>(),
            sum_.defined() ? sum_.const_data_ptr<int32_t>() : nullptr,
            bias_.defined() ? bias_.const_data_ptr() : nullptr,
            bias_.defined() ? bias_.scalar_type() : at::kFloat,
            weight_->size(0),
            weight_->size(1)};
  }

 private:
  c10::MaybeOwned<at::Tensor> weight_, scale_;
  at::Tensor sum_, bias_;
};

inline at::Tensor empty_like_rows(const at::Tensor& x, int64_t n, at::ScalarType dtype) {
  at::DimVector sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return at::empty(sizes, x.options().dtype(dtype));
}

}  // namespace fxopt
