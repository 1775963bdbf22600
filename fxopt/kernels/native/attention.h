// The inner loops of attention: rows of scores against keys, and weighted sums of values.
//
// Up to kQueryRows rows of float32 queries meet the keys together, so that a key or a value is read
// once for all of them: the heads of a group share their keys.
#pragma once

#include <algorithm>
#include <limits>

#include "fxopt/kernels/native/rows.h"

namespace fxopt {

constexpr int64_t kQueryRows = 4;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Zero where `exponential` would stop at its smallest number; NaN passes through.
inline float softmax_weight(float x) { return x < -87.0f ? 0.0f : exponential(x); }

// Eigen's rational approximation of tanh, odd degree 13 over even degree 6.
inline float hyperbolic_tangent(float x) {
  x = x > 7.90531110763549805f ? 7.90531110763549805f : x;
  x = x < -7.90531110763549805f ? -7.90531110763549805f : x;
  const float s = x * x;
  float p = -2.76076847742355e-16f;
  p = p * s + 2.00018790482477e-13f;
  p = p * s - 8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x * p / q;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

inline __mmask16 lanes_mask(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 load_lanes(const float* from, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, from);
}

inline __m512 load_lanes(const c10::BFloat16* from, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline __m512 load_lanes(const c10::Half* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}

// Sums of the sixteen lanes of four vectors.
inline __m128 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(
                                        _mm512_castps_pd(abcd), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// scores[r][j] = q[r] . key[j]; room for three scores more is written.
template <int ROWS, typename T>
inline void score_rows(const float* q, int64_t ldq, const T* keys, int64_t ldk, int64_t count,
                       int64_t width, float* scores, int64_t lds) {
  for (int64_t j = 0; j < count; j += 4) {
    const T* key[4];
    for (int64_t c = 0; c < 4; ++c) key[c] = keys + std::min(j + c, count - 1) * ldk;
    __m512 acc[ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = lanes_mask(width - i);
      __m512 b[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) b[c] = load_lanes(key[c] + i, mask);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m512 row = _mm512_load_ps(q + r * ldq + i);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_fmadd_ps(row, b[c], acc[r][c]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
      _mm_storeu_ps(scores + r * lds + j, add_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
  }
}

// out[r] = out[r] * decay[r] + sum_j weights[r][j] * value[j]
template <int ROWS, typename T>
inline void weigh_rows(const float* weights, int64_t ldw, const T* values, int64_t ldv,
                       int64_t count, int64_t width, const float* decay, float* out,
                       int64_t ldo) {
  for (int64_t first = 0; first < width; first += 64) {
    __mmask16 mask[4];
    __m512 acc[ROWS][4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      mask[c] = lanes_mask(std::max<int64_t>(0, width - first - 16 * c));
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c)
        acc[r][c] = _mm512_mul_ps(_mm512_set1_ps(decay[r]),
                                  load_lanes(out + r * ldo + first + 16 * c, mask[c]));
    for (int64_t j = 0; j < count; ++j) {
      const T* value = values + j * ldv + first;
      __m512 b[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) b[c] = load_lanes(value + 16 * c, mask[c]);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m512 weight = _mm512_set1_ps(weights[r * ldw + j]);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_fmadd_ps(weight, b[c], acc[r][c]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c)
        _mm512_mask_storeu_ps(out + r * ldo + first + 16 * c, mask[c], acc[r][c]);
  }
}

#else

template <int ROWS, typename T>
inline void score_rows(const float* q, int64_t ldq, const T* keys, int64_t ldk, int64_t count,
                       int64_t width, float* scores, int64_t lds) {
  Buffer<float> scratch(width);
  for (int64_t j = 0; j < count; ++j) {
    const float* key = as_compute(keys + j * ldk, scratch.get(), width);
    for (int r = 0; r < ROWS; ++r)
      scores[r * lds + j] =
          sum_row<float>(width, [&](int64_t i) { return q[r * ldq + i] * key[i]; });
  }
}

template <int ROWS, typename T>
inline void weigh_rows(const float* weights, int64_t ldw, const T* values, int64_t ldv,
                       int64_t count, int64_t width, const float* decay, float* out,
                       int64_t ldo) {
  Buffer<float> scratch(width);
  for (int r = 0; r < ROWS; ++r)
    for (int64_t i = 0; i < width; ++i) out[r * ldo + i] *= decay[r];
  for (int64_t j = 0; j < count; ++j) {
    const float* value = as_compute(values + j * ldv, scratch.get(), width);
    for (int r = 0; r < ROWS; ++r) {
      const float weight = weights[r * ldw + j];
      for (int64_t i = 0; i < width; ++i) out[r * ldo + i] += weight * value[i];
    }
  }
}

#endif

// body(std::integral_constant<int, rows>) for a row count that is known only now.
template <typename Body>
inline void with_row_count(int64_t rows, const Body& body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    default: return body(std::integral_constant<int, 4>{});
  }
}

}  // namespace fxopt
