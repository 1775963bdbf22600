// norm_quantize on the CPU: a row is summed, normalized and quantized while it is in cache.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "fxopt/kernels/native/linear.h"
#include "fxopt/kernels/native/norm.h"

namespace fxopt {
namespace {

// What is not asked for is null.
template <typename T>
struct Outputs {
  T* total;
  T* y;
  int8_t* q;
  float* scale;
  int32_t* zero_point;
};

template <typename T>
struct Inputs {
  const T* x;
  const T* residual;
  const compute_t<T>* weight;
  const compute_t<T>* bias;
  const float* pre_scale;
  double eps;
  bool rms;
};

template <typename T>
void quantize_one(const T* y, const Inputs<T>& in, const Outputs<T>& out, int64_t m, int64_t n,
                  float* scratch) {
  const float* row = scaled_row(y, in.pre_scale, scratch, n);
  if (out.zero_point == nullptr) {
    quantize_row(row, n, out.q + m * n, out.scale + m);
  } else {
    quantize_row(row, n, out.q + m * n, out.scale + m, out.zero_point + m);
  }
}

// Rows of a task, and the memory for those that are not returned.
template <typename T>
class RowWorker {
 public:
  using C = compute_t<T>;
  RowWorker(const Inputs<T>& in, const Outputs<T>& out, int64_t n)
      : in_(in), out_(out), n_(n), total_(n), other_(n), normal_(n), rounded_(n), scratch_(n) {}

  void row(int64_t m) {
    T* y = out_.y == nullptr ? rounded_.get() : out_.y + m * n_;
    const C* total = sum(m);
    if constexpr (std::is_same_v<T, C>) {
      normalize(total, y);
    } else {
      normalize(total, normal_);
      store_row(normal_.get(), y, n_);
    }
    quantize_one(y, in_, out_, m, n_, scratch_.get());
  }

 private:
  // x + residual; rounded where who else reads it reads it rounded.
  const C* sum(int64_t m) {
    const C* x = as_compute(in_.x + m * n_, total_.get(), n_);
    T* kept = out_.total == nullptr ? nullptr : out_.total + m * n_;
    if (in_.residual == nullptr) {
      if (kept != nullptr) std::memcpy(kept, in_.x + m * n_, n_ * sizeof(T));
      return x;
    }
    const C* residual = as_compute(in_.residual + m * n_, other_.get(), n_);
    C* total = total_;
    if constexpr (std::is_same_v<T, C>) {
      if (kept != nullptr) total = kept;
    }
    for (int64_t i = 0; i < n_; ++i) total[i] = x[i] + residual[i];
    if constexpr (!std::is_same_v<T, C>) {
      if (kept != nullptr) {
        store_row(total, kept, n_);
        load_row(kept, total, n_);
      }
    }
    return total;
  }

  void normalize(const C* total, C* y) {
    if (in_.rms) {
      rms_norm_row<C>(total, in_.weight, in_.eps, n_, y);
    } else {
      layer_norm_row<C>(total, in_.weight, in_.bias, in_.eps, n_, y);
    }
  }

  const Inputs<T>& in_;
  const Outputs<T>& out_;
  int64_t n_;
  Buffer<C> total_, other_, normal_;
  Buffer<T> rounded_;
  Buffer<float> scratch_;
};

template <typename T>
void normalize_and_quantize(const Inputs<T>& in, const Outputs<T>& out, int64_t rows, int64_t n) {
  parallel_rows(rows, n, [&](int64_t first, int64_t last) {
    RowWorker<T> worker(in, out, n);
    for (int64_t m = first; m < last; ++m) worker.row(m);
  });
}

bool is_rms(c10::string_view norm) {
  FXOPT_CHECK(norm == "layer" || norm == "rms", "unknown norm '", norm, "'; valid: layer, rms");
  return norm == "rms";
}

void check_operands(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                    const std::optional<at::Tensor>& bias, bool rms) {
  FXOPT_CHECK(x.dim() >= 1 && x.size(-1) > 0,
              "norm_quantize needs a tensor [..., D] with D at least 1, got ", x.sizes());
  check_floating(x.scalar_type(), "x");
  FXOPT_CHECK(!rms || !bias.has_value(), "an rms norm has no bias");
  if (!residual.has_value()) return;
  FXOPT_CHECK(x.sizes() == residual->sizes() && x.scalar_type() == residual->scalar_type(),
              "x and residual must have one shape and dtype, got ",
              c10::toString(x.scalar_type()), " ", x.sizes(), " and ",
              c10::toString(residual->scalar_type()), " ", residual->sizes());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_quantize(
    const at::Tensor& x, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps,
    c10::string_view norm, bool asymmetric, bool keep_total, bool keep_norm,
    const std::optional<at::Tensor>& pre_scale) {
  const bool rms = is_rms(norm);
  check_operands(x, residual, bias, rms);
  const at::Tensor input = x.contiguous();
  const at::Tensor other = residual.has_value() ? residual->contiguous() : at::Tensor();
  const int64_t n = x.size(-1);
  const auto like_x = [&](bool wanted) {
    return wanted ? at::empty(x.sizes(), input.options()) : at::empty({0}, input.options());
  };
  at::Tensor total = like_x(keep_total);
  at::Tensor y = like_x(keep_norm);
  at::Tensor q = at::empty(x.sizes(), input.options().dtype(at::kChar));
  at::Tensor scale = empty_like_rows(input, 1, at::kFloat);
  at::Tensor zero_point = asymmetric ? empty_like_rows(input, 1, at::kInt)
                                     : at::empty({0}, input.options().dtype(at::kInt));
  const Parameter<float> factors(pre_scale, n, "pre_scale");
  dispatch_floating(x.scalar_type(), "x", [&](auto sample) {
    using T = decltype(sample);
    const Parameter<compute_t<T>> gain(weight, n, "weight");
    const Parameter<compute_t<T>> shift(bias, n, "bias");
    if (q.numel() == 0) return;
    const Inputs<T> in{input.const_data_ptr<T>(),
                       other.defined() ? other.const_data_ptr<T>() : nullptr,
                       gain.get(), shift.get(), factors.get(), eps, rms};
    const Outputs<T> out{keep_total ? total.mutable_data_ptr<T>() : nullptr,
                         keep_norm ? y.mutable_data_ptr<T>() : nullptr,
                         q.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>(),
                         asymmetric ? zero_point.mutable_data_ptr<int32_t>() : nullptr};
    normalize_and_quantize(in, out, q.numel() / n, n);
  });
  return {total, y, q, scale, zero_point};
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("norm_quantize", TORCH_FN(norm_quantize)); }

}  // namespace fxopt
