// Rows of float32, bfloat16, float16 and float64, and the activation functions.
//
// Arithmetic runs in compute_t<T>: float32 for the short types, float64 for float64. The loops are
// branch-free, so that the compiler vectorizes them for whatever the CPU offers.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "fxopt/kernels/native/check.h"

namespace fxopt {

template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- rows in and out of the compute type ----

inline void load_row(const float* src, float* dst, int64_t n) {
  std::memcpy(dst, src, n * sizeof(float));
}

inline void load_row(const double* src, double* dst, int64_t n) {
  std::memcpy(dst, src, n * sizeof(double));
}

inline void load_row(const double* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

inline void load_row(const c10::BFloat16* src, float* dst, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < n; ++i) dst[i] = bits_as<float>(static_cast<uint32_t>(bits[i]) << 16);
}

inline void load_row(const c10::Half* src, float* dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

inline void store_row(const float* src, float* dst, int64_t n) {
  std::memcpy(dst, src, n * sizeof(float));
}

inline void store_row(const double* src, double* dst, int64_t n) {
  std::memcpy(dst, src, n * sizeof(double));
}

inline void store_row(const float* src, double* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
}

// Round to nearest even on the bits; adding to a NaN could carry it into infinity, so NaN is kept.
inline void store_row(const float* src, c10::BFloat16* dst, int64_t n) {
  auto* bits = reinterpret_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    const auto u = bits_as<uint32_t>(src[i]);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    bits[i] = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

inline void store_row(const float* src, c10::Half* dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), half);
  }
#endif
  for (; i < n; ++i) dst[i] = src[i];
}

// A row in the compute type: the source itself where it has that type already, else a copy.
template <typename T>
inline const compute_t<T>* as_compute(const T* src, compute_t<T>* scratch, int64_t n) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    return src;
  } else {
    load_row(src, scratch, n);
    return scratch;
  }
}

// Calls body with a value of the C++ type of dtype; body is a generic lambda.
template <typename Body>
inline void dispatch_floating(at::ScalarType dtype, const char* what, const Body& body) {
  switch (dtype) {
    case at::kFloat: return body(float{});
    case at::kBFloat16: return body(c10::BFloat16{});
    case at::kHalf: return body(c10::Half{});
    case at::kDouble: return body(double{});
    default:
      raise_kernel_error(c10::str(what, " must be float32, bfloat16, float16 or float64, got ",
                                  c10::toString(dtype)));
  }
}

inline void check_floating(at::ScalarType dtype, const char* what) {
  dispatch_floating(dtype, what, [](auto) {});
}

// ---- activations ----

enum class Activation { none, relu, gelu, gelu_tanh, silu, quick_gelu };

inline Activation parse_activation(c10::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  if (name == "quick_gelu") return Activation::quick_gelu;
  raise_kernel_error(c10::str("unknown activation '", name,
                              "'; valid: none, relu, gelu, gelu_tanh, silu, quick_gelu"));
}

// Cephes' expf without its special cases: both comparisons are false for NaN, which passes through.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 80.0f ? 80.0f : x;  // its inverse is then no denormal, which would be slow
  const float n = std::rint(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_as<float>((static_cast<int32_t>(n) + 127) << 23);
}

inline double exponential(double x) { return std::exp(x); }

// The rational approximation of erf that Eigen and XLA use: odd degree 13 over even degree 8.
inline float error_function(float x) {
  const float z = x > 3.9f ? 3.9f : (x < -3.9f ? -3.9f : x);
  const float s = z * z;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  const float e = z * p / q;
  // Exactly one in the tails: gelu(-100) must be zero, not -100 times a rounding error.
  return x > 3.9f ? 1.0f : (x < -3.9f ? -1.0f : e);
}

inline double error_function(double x) { return std::erf(x); }

template <typename C>
inline C sigmoid(C x) {
  return C(1) / (C(1) + exponential(-x));
}

template <typename C, typename Function>
inline void map_row(C* __restrict x, int64_t n, const Function& function) {
  for (int64_t i = 0; i < n; ++i) x[i] = function(x[i]);
}

template <typename C>
inline void activate(Activation activation, C* x, int64_t n) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return map_row(x, n, [](C v) { return v < C(0) ? C(0) : v; });
    case Activation::gelu:
      return map_row(x, n, [](C v) {
        return C(0.5) * v * (C(1) + error_function(v * C(0.70710678118654752440)));
      });
    case Activation::gelu_tanh:  // (1 + tanh(u)) / 2 = sigmoid(2 u)
      return map_row(x, n, [](C v) {
        const C u = C(0.79788456080286535588) * (v + C(0.044715) * v * v * v);
        return v * sigmoid(C(2) * u);
      });
    case Activation::silu:
      return map_row(x, n, [](C v) { return v * sigmoid(v); });
    case Activation::quick_gelu:
      return map_row(x, n, [](C v) { return v * sigmoid(C(1.702) * v); });
  }
}

}  // namespace fxopt
