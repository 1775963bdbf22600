// linear_w8a16 on the CPU: int8 is exact in bfloat16 as well; the scale comes after the product.
#include <torch/library.h>

#include "fxopt/kernels/native/weight_only.h"

namespace fxopt {
namespace {

inline Floats widen_int8(const int8_t* w) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = w[i];
  return load_floats(lanes);
#endif
}

struct Int8Rows {
  const int8_t* data;  // [n, k]
  const float* scales;  // [n]
  LinearBias bias;
  int64_t n;
  int64_t k;

  bool few_rows_possible() const { return true; }
  int64_t blas_from_rows(at::ScalarType dtype) const { return dtype == at::kBFloat16 ? 20 : 32; }
  float scale(int64_t row) const { return scales[row]; }
  void arrange(const float* x, float* out) const { std::memcpy(out, x, k * sizeof(float)); }

  void widen(int64_t row, float* out) const {
    for (int64_t i = 0; i < k; ++i) out[i] = data[row * k + i];
  }

  template <int ROWS>
  void dot_four(const float* x, int64_t ldx, const int64_t* rows, float out[ROWS][4]) const {
    const int8_t* w[4];
    for (int j = 0; j < 4; ++j) w[j] = data + rows[j] * k;
    Floats acc[ROWS][4] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
      __builtin_prefetch(w[0] + kAhead + i * 4);
      Floats b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) b[j] = widen_int8(w[j] + i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const Floats row = load_floats(x + r * ldx + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[r][j] += row * b[j];
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int j = 0; j < 4; ++j) {
        float sum = sum_lanes(acc[r][j]);
        for (int64_t t = i; t < k; ++t) sum += x[r * ldx + t] * static_cast<float>(w[j][t]);
        out[r][j] = sum;
      }
    }
  }
};

at::Tensor linear_w8a16(const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                        c10::string_view activation) {
  const Activation act = parse_activation(activation);
  FXOPT_CHECK(x.dim() >= 1, "linear_w8a16 needs a tensor [..., K], got a scalar");
  check_floating(x.scalar_type(), "x");
  check_weight(weight, weight_scale, bias, x.size(-1));
  const auto codes = weight.expect_contiguous();
  const auto scales = weight_scale.expect_contiguous();
  const at::Tensor offsets = bias.has_value() ? bias->contiguous() : at::Tensor();
  const Int8Rows rows{codes->const_data_ptr<int8_t>(), scales->const_data_ptr<float>(),
                      linear_bias(offsets), weight.size(0), weight.size(1)};
  return weight_only_linear(x, rows, act);
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("linear_w8a16", TORCH_FN(linear_w8a16)); }

}  // namespace fxopt
