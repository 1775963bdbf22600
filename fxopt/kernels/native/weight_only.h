// Floating activations times a weight of few bits: y = activation(x @ W.T + bias).
//
// Few rows: the weight is read as it is stored and widened in registers, which is bound by memory.
// Many rows: blocks of the weight are widened into cache for the BLAS product.
//
// What a weight must offer:
//   n, k, bias, bias_dtype   its sizes and bias
//   few_rows_possible()      whether `dot_four` can read it
//   blas_from_rows(dtype)    the number of rows of x from which the BLAS product wins (measured)
//   arrange(x, out)          one row of x in the order in which `dot_four` reads it
//   dot_four<ROWS>(x, ldx, rows, out)  out[r][j] = x[r] . w[rows[j]], before `scale`
//   widen(row, out)          one row of the weight, before `scale`
//   scale(row)               what its products are multiplied by
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "fxopt/kernels/native/linear.h"

namespace fxopt {

typedef float Floats __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;
// Bytes of widened weight, and of its products, that are held at a time.
constexpr int64_t kBlockBytes = 4 << 20;

inline Floats load_floats(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

inline float sum_lanes(Floats v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

struct LinearBias {
  const void* data;  // [n] of dtype, or null
  at::ScalarType dtype;

  void load(int64_t first, int64_t count, float* out) const {
    std::fill_n(out, count, 0.0f);
    if (data == nullptr) return;
    dispatch_floating(dtype, "bias", [&](auto sample) {
      load_row(static_cast<const decltype(sample)*>(data) + first, out, count);
    });
  }
};

template <typename Weight>
void finish(const float* acc, const Weight& weight, int64_t first, int64_t count,
            Activation activation, float* values) {
  weight.bias.load(first, count, values);
  for (int64_t j = 0; j < count; ++j) values[j] += acc[j] * weight.scale(first + j);
  activate(activation, values, count);
}

inline void store_values(const float* values, int64_t count, const Destination& y,
                         int64_t offset) {
  dispatch_floating(y.dtype, "x", [&](auto sample) {
    store_row(values, static_cast<decltype(sample)*>(y.data) + offset, count);
  });
}

template <int ROWS, typename Weight>
void few_rows(const float* x, int64_t ldx, const Weight& weight, Activation activation,
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
        int64_t rows[4];
        for (int64_t c = 0; c < 4; ++c) rows[c] = first + std::min(j + c, count - 1);
        float four[ROWS][4];
        weight.template dot_four<ROWS>(x, ldx, rows, four);
        for (int r = 0; r < ROWS; ++r) std::memcpy(acc[r] + j, four[r], sizeof(four[r]));
      }
      for (int r = 0; r < ROWS; ++r) {
        finish(acc[r], weight, first, count, activation, values);
        store_values(values, count, y, r * y.ld + first);
      }
    }
  });
}

template <typename Weight>
void few_rows_of(const Matrix& rows, at::ScalarType dtype, const Weight& weight,
                 Activation activation, const Destination& y) {
  const int64_t ldx = round_up(rows.k, 2 * kLanes);
  Buffer<float> x(rows.m * ldx);
  Buffer<float> scratch(rows.k);
  dispatch_floating(dtype, "x", [&](auto sample) {
    const auto* from = static_cast<const decltype(sample)*>(rows.data);
    for (int64_t m = 0; m < rows.m; ++m) {
      load_row(from + m * rows.ld, scratch.get(), rows.k);
      weight.arrange(scratch.get(), x + m * ldx);
    }
  });
  for (int64_t m = 0; m < rows.m; m += 4) {
    const float* from = x + m * ldx;
    const Destination to{
        static_cast<char*>(y.data) + m * y.ld * c10::elementSize(y.dtype), y.ld, y.dtype};
    switch (std::min<int64_t>(4, rows.m - m)) {
      case 1: few_rows<1>(from, ldx, weight, activation, to); break;
      case 2: few_rows<2>(from, ldx, weight, activation, to); break;
      case 3: few_rows<3>(from, ldx, weight, activation, to); break;
      default: few_rows<4>(from, ldx, weight, activation, to); break;
    }
  }
}

// Rows [first, first + count) of the weight as numbers of the product's type.
template <typename Weight>
at::Tensor widen_block(const Weight& weight, int64_t first, int64_t count,
                       const at::TensorOptions& options, at::ScalarType dtype) {
  at::Tensor block = at::empty({count, weight.k}, options.dtype(dtype));
  at::parallel_for(0, count, 32768 / weight.k + 1, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(round_up(weight.k, 2 * kLanes));
    for (int64_t n = begin; n < end; ++n) {
      weight.widen(first + n, scratch.get());
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
template <typename Weight>
void finish_block(const at::Tensor& product, const Weight& weight, int64_t row, int64_t first,
                  Activation activation, const Destination& y) {
  const int64_t count = product.size(1);
  dispatch_floating(product.scalar_type(), "product", [&](auto sample) {
    const auto* from = product.const_data_ptr<decltype(sample)>();
    at::parallel_for(0, product.size(0), 8192 / count + 1, [&](int64_t begin, int64_t end) {
      Buffer<float> acc(count);
      Buffer<float> values(count);
      for (int64_t m = begin; m < end; ++m) {
        load_row(from + m * count, acc.get(), count);
        finish(acc.get(), weight, first, count, activation, values.get());
        store_values(values, count, y, (row + m) * y.ld + first);
      }
    });
  });
}

// float16 would overflow before the scale is applied, so it goes through float32.
template <typename Weight>
void many_rows(const at::Tensor& x, const Weight& weight, Activation activation,
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

template <typename Weight>
at::Tensor weight_only_linear(const at::Tensor& x, const Weight& weight, Activation activation) {
  at::Tensor y = empty_like_rows(x, weight.n, x.scalar_type());
  if (y.numel() == 0) return y;
  const Destination to{y.mutable_data_ptr(), weight.n, x.scalar_type()};
  const int64_t total = y.numel() / weight.n;
  const bool few = weight.few_rows_possible() && total < weight.blas_from_rows(x.scalar_type());
  if (few || x.size(-1) == 0) {
    Matrix rows = as_matrix(x);
    rows.m = total;
    few_rows_of(rows, x.scalar_type(), weight, activation, to);
  } else {
    many_rows(x, weight, activation, to);
  }
  return y;
}

inline LinearBias linear_bias(const at::Tensor& bias) {
  if (!bias.defined()) return {nullptr, at::kFloat};
  return {bias.const_data_ptr(), bias.scalar_type()};
}

}  // namespace fxopt
