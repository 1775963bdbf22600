// apply_rope on the CPU: heads are read where they lie, and the result keeps the strides of x.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "fxopt/kernels/native/rows.h"

namespace fxopt {
namespace {

template <typename C>
void rotate_half(const C* x, const C* cos, const C* sin, int64_t r, C* out) {
  const int64_t half = r / 2;
  for (int64_t i = 0; i < half; ++i) out[i] = x[i] * cos[i] - x[half + i] * sin[i];
  for (int64_t i = half; i < r; ++i) out[i] = x[i] * cos[i] + x[i - half] * sin[i];
}

template <typename C>
void rotate_pairs(const C* x, const C* cos, const C* sin, int64_t r, C* out) {
  for (int64_t i = 0; i < r; i += 2) {
    out[i] = x[i] * cos[i] - x[i + 1] * sin[i];
    out[i + 1] = x[i + 1] * cos[i + 1] + x[i] * sin[i + 1];
  }
}

// cos or sin over the whole of [B, H, S, R], expanded, with a contiguous last axis, in C.
template <typename C>
at::Tensor expand_angles(const at::Tensor& angles, const at::Tensor& x, int64_t r) {
  const at::ScalarType dtype = c10::CppTypeToScalarType<C>::value;
  const at::Tensor dense = angles.to(dtype).contiguous();
  return dense.expand({x.size(0), x.size(1), x.size(2), r});
}

template <typename T>
void rope_rows(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t r,
               bool interleaved, at::Tensor& y) {
  using C = compute_t<T>;
  const int64_t heads = x.size(1);
  const int64_t steps = x.size(2);
  const int64_t width = x.size(3);
  const T* from = x.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  const C* cosines = cos.const_data_ptr<C>();
  const C* sines = sin.const_data_ptr<C>();
  const auto offset = [](const at::Tensor& t, int64_t b, int64_t h, int64_t s) {
    return b * t.stride(0) + h * t.stride(1) + s * t.stride(2);
  };
  parallel_rows(x.size(0) * steps * heads, width, [&](int64_t first, int64_t last) {
    Buffer<C> scratch(width);
    Buffer<C> out(width);
    for (int64_t i = first; i < last; ++i) {
      const int64_t h = i % heads;
      const int64_t s = i / heads % steps;
      const int64_t b = i / heads / steps;
      const C* row = as_compute(from + offset(x, b, h, s), scratch.get(), width);
      const C* c = cosines + offset(cos, b, h, s);
      const C* n = sines + offset(sin, b, h, s);
      if (interleaved) {
        rotate_pairs(row, c, n, r, out.get());
      } else {
        rotate_half(row, c, n, r, out.get());
      }
      std::memcpy(out + r, row + r, (width - r) * sizeof(C));
      store_row(out.get(), to + offset(y, b, h, s), width);
    }
  });
}

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                      bool interleaved) {
  FXOPT_CHECK(x.dim() == 4, "x must be [B, H, S, D], got ", x.sizes());
  FXOPT_CHECK(cos.dim() >= 1 && cos.sizes() == sin.sizes(),
              "cos and sin must have one shape, got ", cos.sizes(), " and ", sin.sizes());
  const int64_t r = cos.size(-1);
  FXOPT_CHECK(r % 2 == 0 && r <= x.size(3), "cos has R = ", r,
              " channels, which must be even and at most D = ", x.size(3));
  check_floating(x.scalar_type(), "x");
  at::Tensor y = at::empty_like(x);
  if (y.numel() == 0) return y;
  const bool dense = x.stride(3) == 1 && y.stride(3) == 1;
  const at::Tensor input = dense ? x : x.contiguous();
  at::Tensor result = dense ? y : at::empty(x.sizes(), x.options());
  dispatch_floating(x.scalar_type(), "x", [&](auto sample) {
    using T = decltype(sample);
    rope_rows<T>(input, expand_angles<compute_t<T>>(cos, x, r),
                 expand_angles<compute_t<T>>(sin, x, r), r, interleaved, result);
  });
  return dense ? y : y.copy_(result);
}

}  // namespace

TORCH_LIBRARY_IMPL(fxopt, CPU, m) { m.impl("apply_rope", TORCH_FN(apply_rope)); }

}  // namespace fxopt
