// linear_w4a16 on the CPU. Sixteen codes go through the table in one permutation of a register. Two
// codes share a byte, so that the even and the odd columns of 32 lie in the two halves of the bytes
// as they are read; x is brought into that order once, and no code has to be moved.
#include <torch/library.h>

#include "fxopt/kernels/native/weight_only.h"

namespace fxopt {
namespace {

constexpr int64_t kPairs = 2 * kLanes;  // columns that are read together

struct CodeRows {
  const uint8_t* codes;  // [n, (k + 1) / 2]
  const float* table;    // [16]
  const float* scales;   // [n, groups]
  const int8_t* zero;    // [n, groups], or null
  int64_t groups;
  LinearBias bias;
  int64_t n;
  int64_t k;
  // Those of row i are [start[i], start[i + 1]): what is added to the weight at each column.
  const int32_t* outlier_start;
  const int32_t* outlier_column;
  const float* outlier_value;

  int64_t width() const { return groups == 0 ? k : k / groups; }
  bool few_rows_possible() const { return groups == 1 || width() % kPairs == 0; }
  int64_t blas_from_rows(at::ScalarType dtype) const { return dtype == at::kBFloat16 ? 8 : 16; }
  float scale(int64_t) const { return 1.0f; }
  float zero_point(int64_t group) const { return zero == nullptr ? 0.0f : zero[group]; }

  float value(const uint8_t* row, int64_t i) const {
    return table[(row[i / 2] >> (4 * (i & 1))) & 15];
  }

  // Where `arrange` puts column i.
  int64_t place(int64_t i) const {
    if (i >= k - k % kPairs) return i;
    const int64_t first = i - i % kPairs;
    return first + (i % 2) * kLanes + (i - first) / 2;
  }

  template <typename Visit>
  void outliers(int64_t row, const Visit& visit) const {
    if (outlier_start == nullptr) return;
    for (int32_t i = outlier_start[row]; i < outlier_start[row + 1]; ++i)
      visit(outlier_column[i], outlier_value[i]);
  }

  void arrange(const float* x, float* out) const {
    int64_t i = 0;
    for (; i + kPairs <= k; i += kPairs) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        out[i + lane] = x[i + 2 * lane];
        out[i + kLanes + lane] = x[i + 2 * lane + 1];
      }
    }
    std::copy(x + i, x + k, out + i);
  }

  void widen(int64_t row, float* out) const {
    const uint8_t* from = codes + row * ((k + 1) / 2);
    int64_t i = 0;
    for (; i + kPairs <= k; i += kPairs) {
      Floats even, odd;
      load_pairs(from + i / 2, &even, &odd);
      interleave(even, odd, out + i);
    }
    for (; i < k; ++i) out[i] = value(from, i);
    const int64_t size = width();
    for (int64_t g = 0; g < groups; ++g) {
      const float s = scales[row * groups + g];
      const float z = zero_point(row * groups + g);
      for (int64_t t = g * size; t < (g + 1) * size; ++t) out[t] = (out[t] - z) * s;
    }
    outliers(row, [&](int32_t column, float added) { out[column] += added; });
  }

  static void interleave(Floats even, Floats odd, float* out) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 a = reinterpret_cast<__m512>(even), b = reinterpret_cast<__m512>(odd);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(a, low, b));
    _mm512_storeu_ps(out + kLanes, _mm512_permutex2var_ps(a, high, b));
#else
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      out[2 * lane] = even[lane];
      out[2 * lane + 1] = odd[lane];
    }
#endif
  }

  // The columns 0, 2, ... 30 and 1, 3, ... 31 of 32.
  void load_pairs(const uint8_t* from, Floats* even, Floats* odd) const {
#if defined(__AVX512F__)
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512 values = _mm512_loadu_ps(table);  // only the lowest four bits of an index count
    *even = reinterpret_cast<Floats>(_mm512_permutexvar_ps(bytes, values));
    *odd = reinterpret_cast<Floats>(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values));
#else
    float lanes[2][kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[0][i] = table[from[i] & 15];
      lanes[1][i] = table[from[i] >> 4];
    }
    *even = load_floats(lanes[0]);
    *odd = load_floats(lanes[1]);
#endif
  }

  template <int ROWS>
  void dot_four(const float* x, int64_t ldx, const int64_t* rows, float out[ROWS][4]) const {
    const uint8_t* w[4];
    for (int j = 0; j < 4; ++j) w[j] = codes + rows[j] * ((k + 1) / 2);
    const int64_t size = width();
    Floats total[ROWS][4] = {};
    float rest[ROWS][4] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * size, end = first + size;
      const int64_t paired = end - size % kPairs;
      Floats sums[ROWS] = {};  // of x, for zero points: they need not be subtracted from each code
      Floats even[ROWS][4] = {}, odd[ROWS][4] = {};
      for (int64_t i = first; i < paired; i += kPairs) {
        __builtin_prefetch(w[0] + kAhead + i * 2);
        Floats a[4], b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) load_pairs(w[j] + i / 2, &a[j], &b[j]);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const Floats x_even = load_floats(x + r * ldx + i);
          const Floats x_odd = load_floats(x + r * ldx + i + kLanes);
          if (zero != nullptr) sums[r] += x_even + x_odd;
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            even[r][j] += x_even * a[j];
            odd[r][j] += x_odd * b[j];
          }
        }
      }
      for (int j = 0; j < 4; ++j) {
        const float s = scales[rows[j] * groups + g];
        const float z = zero_point(rows[j] * groups + g);
        for (int r = 0; r < ROWS; ++r) {
          total[r][j] += (even[r][j] + odd[r][j] - sums[r] * z) * s;
          for (int64_t t = paired; t < end; ++t)
            rest[r][j] += x[r * ldx + t] * (value(w[j], t) - z) * s;
        }
      }
    }
    for (int j = 0; j < 4; ++j) {
      outliers(rows[j], [&](int32_t column, float added) {
        const int64_t at = place(column);
        for (int r = 0; r < ROWS; ++r) rest[r][j] += x[r * ldx + at] * added;
      });
    }
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < 4; ++j) out[r][j] = sum_lanes(total[r][j]) + rest[r][j];
  }
};

void check_codes(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& table,
                 const std::optional<at::Tensor>& zero_point, int64_t k) {
  FXOPT_CHECK(codes.scalar_type() == at::kByte && codes.dim() == 2 &&
                  codes.size(1) == (k + 1) / 2,
              "codes must be uint8 [N, ", (k + 1) / 2, "] for K = ", k, ", got ",
              c10::toString(codes.scalar_type()), " ", codes.sizes());
  FXOPT_CHECK(table.scalar_type() == at::kFloat && table.numel() == 16,
              "table must be float32 with 16 values, got ", c10::toString(table.scalar_type()),
              " ", table.sizes());
  FXOPT_CHECK(scale.scalar_type() == at::kFloat && scale.dim() == 2 &&
                  scale.size(0) == codes.size(0) && scale.size(1) > 0 && k % scale.size(1) == 0,
              "scale must be float32 [", codes.size(0), ", G] with G a divisor of K = ", k,
              ", got ", c10::toString(scale.scalar_type()), " ", scale.sizes());
  if (zero_point.has_value())
    FXOPT_CHECK(zero_point->scalar_type() == at::kChar && zero_point->sizes() == scale.sizes(),
                "zero_point must be int8 ", scale.sizes(), ", got ",
                c10::toString(zero_point->scalar_type()), " ", zero_point->sizes());
}

void check_outliers(const std::optional<at::Tensor>& start, const std::optional<at::Tensor>& column,
                    const std::optional<at::Tensor>& value, int64_t n) {
  FXOPT_CHECK(start.has_value() == column.has_value() && start.has_value() == value.has_value(),
              "outlier_start, outlier_column and outlier_value come together or not at all");
  if (!start.has_value()) return;
  FXOPT_CHECK(start->scalar_type() == at::kInt && start->numel() == n + 1,
              "outlier_start must be int32 with N + 1 = ", n + 1, " elements, got ",
              c10::toString(start->scalar_type()), " ", start->sizes());
  FXOPT_CHECK(column->scalar_type() == at::kInt && value->scalar_type() == at::kFloat &&
                  column->numel() == value->numel(),
              "outlier_column must be int32 and outlier_value float32 of one size, got ",
              c10::toString(column->scalar_type()), " ", column->sizes(), " and ",
              c10::toString(value->scalar_type()), " ", value->sizes());
}

// The kernels read and write at these places: a stored folder may hold any number here.
void check_places(const int32_t* start, const int32_t* column, int64_t count, int64_t n,
                  int64_t k) {
  if (start == nullptr) return;
  bool rises = start[0] == 0 && start[n] == count;
  for (int64_t row = 0; row < n; ++row) rises &= start[row] <= start[row + 1];
  FXOPT_CHECK(rises, "outlier_start must rise from 0 to the number of outliers, ", count);
  uint32_t last = 0;  // as unsigned numbers the negative ones are the largest
  for (int64_t i = 0; i < count; ++i) last = std::max(last, static_cast<uint32_t>(column[i]));
  FXOPT_CHECK(count == 0 || last < k, "outlier_column must lie in [0, K) with K = ", k);
}

at::Tensor contiguous_or_none(const std::optional<at::Tensor>& value) {
  return value.has_value() ? value->contiguous() : at::Tensor();
}

template <typename T>
const T* data_or_null(const at::Tensor& value) {
  return value.defined() ? value.const_data_ptr<T>() : nullptr;
}

at::Tensor linear_w4a16(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero_point,
                        const std::optional<at::Tensor>& bias, c10::string_view activation,
                        const at::Tensor& table, const std::optional<at::Tensor>& outlier_start,
                        const std::optional<at::Tensor>& outlier_column,
                        const std::optional<at::Tensor>& outlier_value) {
  const Activation act = parse_activation(activation);
  FXOPT_CHECK(x.dim() >= 1, "linear_w4a16 needs a tensor [..., K], got a scalar");
  check_floating(x.scalar_type(), "x");
  const int64_t n = codes.dim() > 0 ? codes.size(0) : 0;
  check_codes(codes, scale, table, zero_point, x.size(-1));
  check_outliers(outlier_start, outlier_column, outlier_value, n);
  check_bias(bias, n);
  const at::Tensor packed = codes.contiguous();
  const at::Tensor scales = scale.contiguous();
  const at::Tensor values = table.contiguous();
  const at::Tensor zeros = contiguous_or_none(zero_point);
  const at::Tensor offsets = contiguous_or_none(bias);
  const at::Tensor start = contiguous_or_none(outlier_start);
  const at::Tensor column = contiguous_or_none(outlier_column);
  const at::Tensor added = contiguous_or_none(outlier_value);
  check_places(data_or_null<int32_t>(start), data_or_null<int32_t>(column),
               column.defined() ? column.numel() : 0, n, x.size(-1));
  const CodeRows rows{packed.const_data_ptr<uint8_t>(),
                      values.const_data_ptr<float>(),
                      scales.const_data_ptr<float>(),
                      data_or_null<int8_t>(zeros),
                      scale.size(1),
                      linear_bias(offsets),
                      n,
                      x.size(-1),
                      data_or_null<int32_t>(start),
                      data_or_null<int32_t>(column),
                      data_or_null<float>(added)};
  return weight_only_linear(x, rows, act);
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("linear_w4a16", TORCH_FN(linear_w4a16)); }

}  // namespace fxopt
