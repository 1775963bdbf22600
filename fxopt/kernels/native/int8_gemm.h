// Exact int8 x int8 -> int32 products of a row-major A [M, K] with panels of rows of W [N, K].
//
// vpdpbusd multiplies unsigned by signed bytes. W is the unsigned side: w + 128 is one xor, the
// accumulator then holds sum(a * w) + 128 * sum(a), and the caller subtracts kOffset times the sum
// of the row of A. No step saturates. Two kernels: `dot` reads W as it lies (decode: W is read
// once, nothing is worth packing), `tile` reads a packed panel from cache. Without VNNI, `dot`
// widens to int16, which is exact as well, and kOffset is zero.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fxopt/kernels/native/buffer.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define FXOPT_VNNI 1
#include <immintrin.h>
#else
#define FXOPT_VNNI 0
#endif

namespace fxopt {

constexpr int64_t kPanel = 64;                     // columns of the result done together
constexpr int32_t kOffset = FXOPT_VNNI ? 128 : 0;  // what the kernels add to every w

// Rows of A whose product with the whole panel is computed at a time.
constexpr int64_t kDotRows = 4;
constexpr int64_t kTileRows = 6;
// How far ahead of its use W is asked for, in the order of memory: rows read side by side are as
// many streams, which the hardware's own prefetching follows at a third of the speed.
constexpr int64_t kAhead = 16 << 10;
// Below this many rows packing a panel costs more than it saves (measured).
constexpr int64_t kPackFromRows = 10;

#if FXOPT_VNNI

inline __mmask64 tail_mask(int64_t count) {
  return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
}

// The sum of a row of A.
inline int32_t sum_int8(const int8_t* row, int64_t k) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(row + i));
  if (i < k)
    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(tail_mask(k - i), row + i));
  return _mm512_reduce_add_epi32(sum);
}

// Sums of the sixteen lanes of four vectors.
inline __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd),
                                        _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// out[r][0..4) = a[r] . (w[j] + 128), for ROWS rows of A and four rows of W.
template <int ROWS>
inline void dot_four(const int8_t* a, int64_t lda, const int8_t* const* w, int64_t k,
                     int32_t* out) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i acc[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= k; i += 64) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(w[0]) + kAhead + i * 4 + j * 64, _MM_HINT_T0);
      b[j] = _mm512_xor_si512(_mm512_loadu_si512(w[j] + i), flip);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512i row = _mm512_loadu_si512(a + r * lda + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], b[j], row);
    }
  }
  if (i < k) {
    const __mmask64 mask = tail_mask(k - i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512i row = _mm512_maskz_loadu_epi8(mask, a + r * lda + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i b = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[j] + i), flip);
        acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], b, row);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + r * kPanel),
                     sum_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
}

template <int ROWS>
inline void dot_panel(const int8_t* a, int64_t lda, const int8_t* const* w, int64_t columns,
                      int64_t k, int32_t* out) {
  for (int64_t j = 0; j < columns; j += 4) {
    // The last group repeats its last row of W; the panel buffer has room for it.
    const int64_t last = columns - 1;
    const int8_t* four[4] = {w[j], w[std::min(j + 1, last)], w[std::min(j + 2, last)],
                             w[std::min(j + 3, last)]};
    dot_four<ROWS>(a, lda, four, k, out + j);
  }
}

// Transposes 16 rows of 16 four-byte groups: rows[g] then holds group g of all sixteen rows.
inline void transpose_groups(__m512i* rows) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  __m512i u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i lo02 = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
    const __m512i lo13 = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
    const __m512i hi02 = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
    const __m512i hi13 = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(lo02, hi02, 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(lo02, hi02, 0xdd);
    rows[4 + i] = _mm512_shuffle_i32x4(lo13, hi13, 0x88);
    rows[12 + i] = _mm512_shuffle_i32x4(lo13, hi13, 0xdd);
  }
}

// packed[k / 4][64 columns][4] = w + 128; columns that do not exist are left as zero bytes.
inline void pack_panel(const int8_t* const* w, int64_t columns, int64_t k, uint8_t* packed) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t first = 0; first < kPanel; first += 16) {
    const auto* ahead = reinterpret_cast<const char*>(w[std::min(first, columns - 1)]) + kAhead;
    for (int64_t i = 0; i < k; i += 64) {
      const __mmask64 mask = tail_mask(k - i);
      __m512i rows[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j) {
        _mm_prefetch(ahead + i * 16 + j * 64, _MM_HINT_T0);
        rows[j] = first + j < columns
                      ? _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[first + j] + i), flip)
                      : _mm512_setzero_si512();
      }
      transpose_groups(rows);
      const int64_t groups = std::min<int64_t>(16, (k - i + 3) / 4);
      for (int64_t g = 0; g < groups; ++g)
        _mm512_store_si512(packed + ((i / 4 + g) * kPanel + first) * 4, rows[g]);
    }
  }
}

// out[r][0..64) = a[r] . packed panel; groups = ceil(K / 4), and A is padded with zeros to it.
template <int ROWS>
inline void tile(const int8_t* a, int64_t lda, const uint8_t* packed, int64_t groups,
                 int32_t* out) {
  __m512i acc[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; ++g) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = _mm512_load_si512(packed + (g * 4 + j) * 64);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      std::memcpy(&four, a + r * lda + g * 4, 4);
      const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], b[j], row);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_si512(out + r * kPanel + j * 16, acc[r][j]);
}

inline void tile_rows(int64_t rows, const int8_t* a, int64_t lda, const uint8_t* packed,
                      int64_t groups, int32_t* out) {
  switch (rows) {
    case 1: return tile<1>(a, lda, packed, groups, out);
    case 2: return tile<2>(a, lda, packed, groups, out);
    case 3: return tile<3>(a, lda, packed, groups, out);
    case 4: return tile<4>(a, lda, packed, groups, out);
    case 5: return tile<5>(a, lda, packed, groups, out);
    default: return tile<6>(a, lda, packed, groups, out);
  }
}

#else

inline int32_t sum_int8(const int8_t* row, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += row[i];
  return sum;
}

template <int ROWS>
inline void dot_panel(const int8_t* a, int64_t lda, const int8_t* const* w, int64_t columns,
                      int64_t k, int32_t* out) {
  for (int r = 0; r < ROWS; ++r) {
    const int8_t* row = a + r * lda;
    for (int64_t j = 0; j < columns; ++j) {
      const int8_t* column = w[j];
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i)
        sum += static_cast<int16_t>(row[i]) * static_cast<int16_t>(column[i]);
      out[r * kPanel + j] = sum;
    }
  }
}

#endif

inline void dot_rows(int64_t rows, const int8_t* a, int64_t lda, const int8_t* const* w,
                     int64_t columns, int64_t k, int32_t* out) {
  switch (rows) {
    case 1: return dot_panel<1>(a, lda, w, columns, k, out);
    case 2: return dot_panel<2>(a, lda, w, columns, k, out);
    case 3: return dot_panel<3>(a, lda, w, columns, k, out);
    default: return dot_panel<4>(a, lda, w, columns, k, out);
  }
}

// A [m, k]: row stride lda, each row readable and zero up to the next multiple of four.
struct Rows {
  const int8_t* data;
  int64_t lda;
  int64_t m;
  int64_t k;
};

// How many rows of A are one task of the packed kernel. A block of A stays in the second-level
// cache while the panels pass over it; every task packs its panel, which 48 rows are worth; and
// there should be a few tasks of one size for each thread.
inline int64_t row_block(int64_t m, int64_t k, int64_t panels) {
  const int64_t fitting = std::clamp<int64_t>((512 << 10) / (k + 1), 96, 384);
  const int64_t wanted = 3 * at::get_num_threads() / std::max<int64_t>(1, panels);
  const int64_t least = (m + fitting - 1) / fitting;
  const int64_t most = std::max(least, m / 48);
  const int64_t blocks = std::clamp(wanted, least, most);
  return round_up((m + blocks - 1) / blocks, kTileRows);
}

// Computes all panels of the product on all threads.
//   panel_rows(panel, w) fills w with pointers to the panel's rows of W and returns how many;
//   epilogue(panel) returns finish(first_row, rows, acc), which gets acc[rows][kPanel], kOffset not
//   yet taken off, and columns beyond the panel's undefined.
template <typename PanelRows, typename Epilogue>
void int8_gemm(const Rows& a, int64_t panels, const PanelRows& panel_rows,
               const Epilogue& epilogue) {
  const bool pack = FXOPT_VNNI && a.m >= kPackFromRows;
  const int64_t block = pack ? row_block(a.m, a.k, panels) : std::max<int64_t>(1, a.m);
  const int64_t blocks = (a.m + block - 1) / block;
  // A thread is worth waking for some ten microseconds of work.
  const int64_t work = kPanel * (a.k + 64) * std::min<int64_t>(block, 16);
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / work);
  at::parallel_for(0, blocks * panels, grain, [&](int64_t first, int64_t last) {
    const int64_t groups = (a.k + 3) / 4;
    Buffer<uint8_t> packed(pack ? groups * kPanel * 4 : 0);
    alignas(64) int32_t acc[kTileRows * kPanel];
    const int8_t* w[kPanel];
    for (int64_t task = first; task < last; ++task) {
      const int64_t panel = task % panels;
      const int64_t start = task / panels * block;
      const int64_t stop = std::min(a.m, start + block);
      const int64_t columns = panel_rows(panel, w);
      const auto finish = epilogue(panel);
#if FXOPT_VNNI
      if (pack) pack_panel(w, columns, a.k, packed);
#endif
      const int64_t step = pack ? kTileRows : kDotRows;
      for (int64_t m = start; m < stop; m += step) {
        const int64_t rows = std::min(step, stop - m);
        const int8_t* a_rows = a.data + m * a.lda;
#if FXOPT_VNNI
        if (pack) {
          tile_rows(rows, a_rows, a.lda, packed, groups, acc);
        } else
#endif
        {
          dot_rows(rows, a_rows, a.lda, w, columns, a.k, acc);
        }
        finish(m, rows, acc);
      }
    }
  });
}

}  // namespace fxopt
