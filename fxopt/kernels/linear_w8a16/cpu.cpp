// linear_w8a16 on the CPU. Few rows: the weight is read as int8 and widened in registers, which is
// bound by memory. Many rows: blocks of the weight are widened into cache for the BLAS product,
// where int8 is exact in bfloat16 as well; the scale comes after the product.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "fxopt/kernels/native/linear.h"

namespace fxopt {
namespace {

typedef float Floats __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;
// Bytes of widened weight, and of its products, that are held at a time.
constexpr int64_t kBlockBytes = 4 << 20;

// The number of rows from which the BLAS product wins (measured).
inline int64_t blas_from_rows(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 8 : 16; }

inline Floats load_floats(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

inline Floats widen(const int8_t* w) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#else
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = w[i];
  return load_floats(lanes);
#endif
}

inline float sum_lanes(Floats v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// out[r] = x[r] . w[j] for ROWS rows of x and four rows of w.
template <int ROWS>
inline void dot_four(const float* x, int64_t k, const int8_t* const* w, float out[ROWS][4]) {
  Floats acc[ROWS][4] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    __builtin_prefetch(w[0] + kAhead + i * 4);
    Floats b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = widen(w[j] + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats row = load_floats(x + r * k + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] += row * b[j];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < 4; ++j) {
      float sum = sum_lanes(acc[r][j]);
      for (int64_t t = i; t < k; ++t) sum += x[r * k + t] * static_cast<float>(w[j][t]);
      out[r][j] = sum;
    }
  }
}

void finish(const float* acc, const Int8Weight& weight, int64_t first, int64_t count,
            Activation activation, float* values) {
  std::fill_n(values, count, 0.0f);
  if (weight.bias != nullptr) load_bias(weight, first, count, values);
  const float* scale = weight.scale + first;
  for (int64_t j = 0; j < count; ++j) values[j] += acc[j] * scale[j];
  activate(activation, values, count);
}

void store(const float* values, int64_t count, const Destination& y, int64_t offset) {
  dispatch_floating(y.dtype, "x", [&](auto sample) {
    store_row(values, static_cast<decltype(sample)*>(y.data) + offset, count);
  });
}

template <int ROWS>
void few_rows(const float* x, const Int8Weight& weight, Activation activation,
              const Destination& y) {
  const int64_t panels = (weight.n + kPanel - 1) / kPanel;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (kPanel * (weight.k + 64)));
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    float acc[ROWS][kPanel];
    float values[kPanel];
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel;
      const int64_t count = std::min(kPanel, weight.n - first);
      for (int64_t j = 0; j < count; j += 4) {
        const int8_t* w[4];
        for (int64_t c = 0; c < 4; ++c)
          w[c] = weight.data + (first + std::min(j + c, count - 1)) * weight.k;
        float four[ROWS][4];
        dot_four<ROWS>(x, weight.k, w, four);
        for (int r = 0; r < ROWS; ++r) std::memcpy(acc[r] + j, four[r], sizeof(four[r]));
      }
      for (int r = 0; r < ROWS; ++r) {
        finish(acc[r], weight, first, count, activation, values);
        store(values, count, y, r * y.ld + first);
      }
    }
  });
}

void few_rows_of(const Matrix& rows, at::ScalarType dtype, const Int8Weight& weight,
                 Activation activation, const Destination& y) {
  Buffer<float> x(rows.m * rows.k);
  dispatch_floating(dtype, "x", [&](auto sample) {
    const auto* from = static_cast<const decltype(sample)*>(rows.data);
    for (int64_t m = 0; m < rows.m; ++m) load_row(from + m * rows.ld, x + m * rows.k, rows.k);
  });
  for (int64_t m = 0; m < rows.m; m += 4) {
    const float* from = x + m * rows.k;
    const Destination to{
        static_cast<char*>(y.data) + m * y.ld * c10::elementSize(y.dtype), y.ld, y.dtype};
    switch (std::min<int64_t>(4, rows.m - m)) {
      case 1: few_rows<1>(from, weight, activation, to); break;
      case 2: few_rows<2>(from, weight, activation, to); break;
      case 3: few_rows<3>(from, weight, activation, to); break;
      default: few_rows<4>(from, weight, activation, to); break;
    }
  }
}

// Rows [first, first + count) of the weight as numbers of the product's type.
at::Tensor widen_block(const Int8Weight& weight, int64_t first, int64_t count,
                       const at::TensorOptions& options, at::ScalarType dtype) {
  at::Tensor block = at::empty({count, weight.k}, options.dtype(dtype));
  const int8_t* from = weight.data + first * weight.k;
  at::parallel_for(0, count, 32768 / weight.k + 1, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(weight.k);
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < weight.k; ++i) scratch[i] = from[n * weight.k + i];
      if (dtype == at::kFloat) {
        store_row(scratch, block.mutable_data_ptr<float>() + n * weight.k, weight.k);
      } else {
        store_row(scratch, block.mutable_data_ptr<c10::BFloat16>() + n * weight.k, weight.k);
      }
    }
  });
  return block;
}

// y[row + m, first + j] from the block of products [m, j].
void finish_block(const at::Tensor& product, const Int8Weight& weight, int64_t row, int64_t first,
                  Activation activation, const Destination& y) {
  const int64_t count = product.size(1);
  dispatch_floating(product.scalar_type(), "product", [&](auto sample) {
    const auto* from = product.const_data_ptr<decltype(sample)>();
    at::parallel_for(0, product.size(0), 8192 / count + 1, [&](int64_t begin, int64_t end) {
      Buffer<float> acc(count);
      Buffer<float> values(count);
      for (int64_t m = begin; m < end; ++m) {
        load_row(from + m * count, acc.get(), count);
        finish(acc, weight, first, count, activation, values);
        store(values, count, y, (row + m) * y.ld + first);
      }
    });
  });
}

// float16 would overflow before the scale is applied, so it goes through float32.
void many_rows(const at::Tensor& x, const Int8Weight& weight, Activation activation,
               const Destination& y) {
  const at::ScalarType dtype = x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const at::Tensor rows = x.reshape({-1, weight.k}).to(dtype);
  const int64_t width = static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t columns = std::max(kPanel, kBlockBytes / (weight.k * width));
  for (int64_t first = 0; first < weight.n; first += columns) {
    const int64_t count = std::min(columns, weight.n - first);
    const at::Tensor block = widen_block(weight, first, count, x.options(), dtype).t();
    const int64_t height = std::max(kPanel, kBlockBytes / (count * width));
    at::Tensor product = at::empty({std::min(height, rows.size(0)), count}, rows.options());
    for (int64_t row = 0; row < rows.size(0); row += height) {
      const int64_t m = std::min(height, rows.size(0) - row);
      at::Tensor part = product.narrow(0, 0, m);
      at::mm_out(part, rows.narrow(0, row, m), block);
      finish_block(part, weight, row, first, activation, y);
    }
  }
}

at::Tensor linear_w8a16(const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                        c10::string_view activation) {
  const Activation act = parse_activation(activation);
  FXOPT_CHECK(x.dim() >= 1, "linear_w8a16 needs a tensor [..., K], got a scalar");
  check_floating(x.scalar_type(), "x");
  check_weight(weight, weight_scale, bias, x.size(-1));
  at::Tensor y = empty_like_rows(x, weight.size(0), x.scalar_type());
  if (y.numel() == 0) return y;
  const WeightView parts(weight, weight_scale, std::nullopt, bias);
  const Destination to{y.mutable_data_ptr(), weight.size(0), x.scalar_type()};
  const int64_t total = y.numel() / weight.size(0);
  if (total < blas_from_rows(x.scalar_type()) || x.size(-1) == 0) {
    Matrix rows = as_matrix(x);
    rows.m = total;
    few_rows_of(rows, x.scalar_type(), parts.view(), act, to);
  } else {
    many_rows(x, parts.view(), act, to);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("linear_w8a16", TORCH_FN(linear_w8a16)); }

}  // namespace fxopt
