// linear_w8a8 on the CPU: VNNI product and epilogue, tile by tile.
#include <torch/library.h>

#include "fxopt/kernels/native/linear.h"

namespace fxopt {
namespace {

void check_activations(const at::Tensor& q, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero_point,
                       const std::optional<at::Tensor>& weight_sum, int64_t n) {
  FXOPT_CHECK(q.dim() >= 1 && q.scalar_type() == at::kChar, "q must be int8 [..., K], got ",
              c10::toString(q.scalar_type()), " ", q.sizes());
  const int64_t rows = c10::multiply_integers(q.sizes().slice(0, q.dim() - 1));
  FXOPT_CHECK(scale.scalar_type() == at::kFloat && (scale.numel() == 1 || scale.numel() == rows),
              "scale must be float32 with one element or one per row (", rows, "), got ",
              c10::toString(scale.scalar_type()), " ", scale.sizes());
  if (!zero_point.has_value()) return;
  FXOPT_CHECK(zero_point->scalar_type() == at::kInt && zero_point->numel() == scale.numel(),
              "zero_point must be int32 and shaped like scale ", scale.sizes(), ", got ",
              c10::toString(zero_point->scalar_type()), " ", zero_point->sizes());
  FXOPT_CHECK(weight_sum.has_value() && weight_sum->scalar_type() == at::kInt &&
                  weight_sum->numel() == n,
              "zero_point needs weight_sum, the int32 row sums of weight with N = ", n,
              " elements");
}

// Rows padded with zeros to a multiple of four, which the packed kernel reads.
at::Tensor pad_rows(const Matrix& rows) {
  const int64_t ld = round_up(rows.k, 64);
  at::Tensor padded = at::empty({rows.m, ld}, rows.keep.options());
  const auto* from = static_cast<const int8_t*>(rows.data);
  auto* to = padded.mutable_data_ptr<int8_t>();
  for (int64_t m = 0; m < rows.m; ++m) {
    std::memcpy(to + m * ld, from + m * rows.ld, rows.k);
    std::memset(to + m * ld + rows.k, 0, ld - rows.k);
  }
  return padded;
}

void sum_rows(const Rows& q, int32_t* sums) {
  at::parallel_for(0, q.m, 32768 / (q.k + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) sums[m] = sum_int8(q.data + m * q.lda, q.k);
  });
}

at::Tensor linear_w8a8(const at::Tensor& q, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero_point, const at::Tensor& weight,
                       const at::Tensor& weight_scale, const std::optional<at::Tensor>& weight_sum,
                       const std::optional<at::Tensor>& bias, c10::string_view activation,
                       at::ScalarType dtype) {
  const Activation act = parse_activation(activation);
  check_floating(dtype, "dtype");
  check_activations(q, scale, zero_point, weight_sum, weight.dim() == 2 ? weight.size(0) : -1);
  check_weight(weight, weight_scale, bias, q.size(-1));
  at::Tensor y = empty_like_rows(q, weight.size(0), dtype);
  if (y.numel() == 0) return y;
  Matrix rows = as_matrix(q);
  rows.m = y.numel() / weight.size(0);
  if (rows.k % 4 != 0) {
    rows.keep = pad_rows(rows);
    rows.data = rows.keep.const_data_ptr();
    rows.ld = rows.keep.size(1);
  }
  const Rows a{static_cast<const int8_t*>(rows.data), rows.ld, rows.m, rows.k};
  Buffer<int32_t> sums(a.m);
  sum_rows(a, sums);
  const auto scales = scale.expect_contiguous();
  const at::Tensor zero_points = zero_point.has_value() ? zero_point->contiguous() : at::Tensor();
  const QuantizedRows quantized{a, scales->const_data_ptr<float>(), scale.numel() == 1 ? 0 : 1,
                                sums,
                                zero_points.defined() ? zero_points.const_data_ptr<int32_t>()
                                                      : nullptr};
  const WeightView parts(weight, weight_scale, weight_sum, bias);
  linear_rows(quantized, parts.view(), act, {y.mutable_data_ptr(), weight.size(0), dtype});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("linear_w8a8", TORCH_FN(linear_w8a8)); }

}  // namespace fxopt
