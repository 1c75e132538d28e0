// Similarities of one example to many: bounds from a byte per value, and the exact ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "syncmask/vector.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SYNCMASK_AVX2_AT_RUN_TIME
#endif

namespace syncmask {

constexpr int64_t kCoarseWidth = 32;  // rows of bytes are padded with zeros to a multiple of this
constexpr int kByteMax = 127;
constexpr float kSmallest = 1e-15f, kLargest = 1e15f;  // outside of them a bound could overflow

// The largest and the sum of the magnitudes of a row.
struct Magnitudes {
  float most, sum;

  // `most` is NaN where bytes cannot stand for the row.
  SYNCMASK_INLINE Magnitudes(const float* row, int64_t dim) {
    Maximum maximum;
    Floats sums = {};
    for (int64_t d = 0; d < dim; d += kLanes) {
      Floats value = {};
      if (d + kLanes <= dim) {
        widen(row + d, value);
      } else {
        for (int64_t i = d; i < dim; ++i) value[i - d] = row[i];
      }
      value = value < 0.0f ? -value : value;
      maximum.take(value);
      sums += value;
    }
    most = maximum.value();
    if (!(most >= kSmallest && most <= kLargest)) most = NAN;
    sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  }
};

// To the nearest whole number, of at most 2^22: what is added leaves no room for a fraction.
SYNCMASK_INLINE float whole(float value) {
  constexpr float kNoFractions = 0x1.8p23f;
  return (value + kNoFractions) - kNoFractions;
}

// A row as bytes, which times the scale that is returned are within half a scale of it. The scale
// is NaN, and so are all bounds, where the row has no such bytes.
SYNCMASK_INLINE float coarsen(const float* __restrict row, int64_t dim,
                              int8_t* __restrict bytes) {
  const float most = Magnitudes(row, dim).most;
  const float steps = kByteMax / most;
  if (most == most) {
    for (int64_t d = 0; d < dim; ++d) bytes[d] = static_cast<int8_t>(whole(row[d] * steps));
  }
  return most / kByteMax;
}

// A row that many are compared with: times `scale` the values are it, as near as 16 bits allow.
// Similarities that follow from the values are off by at most `error` scales of the other row.
struct Query {
  int16_t* values;
  float scale, error;

  SYNCMASK_INLINE void read(const float* row, int64_t dim, int64_t width) {
    const auto [most, sum] = Magnitudes(row, dim);
    // So large that no sum of products overflows 32 bits.
    const float top = std::min<int64_t>(INT16_MAX, INT32_MAX / (kByteMax * width));
    const float steps = top / most;
    int16_t* __restrict out = values;
    if (most == most) {
      for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<int16_t>(whole(row[d] * steps));
    }
    scale = most / top;
    // Half a scale of the bytes, half a scale of the values, and what floats round, here and in
    // the exact similarity.
    const float roundings = 0x1p-23f * kByteMax * static_cast<float>(dim + 8);
    error = sum * (0.5f + roundings) + 0.51f * scale * kByteMax * static_cast<float>(dim);
  }
};

// The products of a query's values with the bytes of each row.
SYNCMASK_INLINE void products(const int16_t* values, const int8_t* rows, int64_t count,
                              int64_t width, int32_t* sums) {
  for (int64_t i = 0; i < count; ++i) {
    int32_t sum = 0;
    for (int64_t d = 0; d < width; ++d) {
      sum += static_cast<int32_t>(values[d]) * static_cast<int16_t>(rows[i * width + d]);
    }
    sums[i] = sum;
  }
}

#ifdef SYNCMASK_AVX2_AT_RUN_TIME
// The same, four rows side by side: they read the query once and do not wait for each other's sums,
// which the compiler does not find by itself. `width` is a multiple of kCoarseWidth.
__attribute__((target("avx2"))) inline void products_avx2(const int16_t* values,
                                                          const int8_t* rows, int64_t count,
                                                          int64_t width, int32_t* sums) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    __m256i sum[4] = {};
    for (int64_t d = 0; d < width; d += 16) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + d));
      for (int r = 0; r < 4; ++r) {
        const int8_t* bytes = rows + (i + r) * width + d;
        const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        const __m256i pairs = _mm256_madd_epi16(value, _mm256_cvtepi8_epi16(some));
        sum[r] = _mm256_add_epi32(sum[r], pairs);
      }
    }
    const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]),
                                             _mm256_hadd_epi32(sum[2], sum[3]));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(halves),
                                       _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + i), four);
  }
  products(values, rows + i * width, count - i, width, sums + i);
}
#endif

// What the similarities of rows are at least and at most, by the products of their bytes.
SYNCMASK_INLINE void bound(const Query& query, const int32_t* __restrict sums,
                           const float* __restrict scales, int64_t count, float* __restrict low,
                           float* __restrict high) {
  const float scale = query.scale, error = query.error;
  for (int64_t i = 0; i < count; ++i) {
    const float middle = scale * static_cast<float>(sums[i]);
    low[i] = scales[i] * (middle - error);
    high[i] = scales[i] * (middle + error);
  }
}

// The largest lower bound of rows that may be below the ceiling. A bound that is NaN is none.
SYNCMASK_INLINE float floor_of(const float* low, const float* high, int64_t count, float ceiling) {
  constexpr int64_t kChains = 16;
  float floors[kChains];
  for (float& floor : floors) floor = -INFINITY;
  const auto raise = [&](float& floor, int64_t i) {
    floor = high[i] < ceiling && low[i] > floor ? low[i] : floor;
  };
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    for (int64_t lane = 0; lane < kChains; ++lane) raise(floors[lane], i + lane);
  }
  for (; i < count; ++i) raise(floors[0], i);
  return *std::max_element(floors, floors + kChains);
}

// The places of rows whose bounds do not rule them out; a bound that is NaN rules out nothing.
SYNCMASK_INLINE int64_t hopeful(const float* low, const float* high, int64_t count, float floor,
                                float ceiling, uint32_t* places) {
  constexpr int64_t kBlock = 16;  // most have no place to write
  const auto may = [&](int64_t i) { return !(high[i] < floor || low[i] >= ceiling); };
  int64_t found = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t end = std::min(first + kBlock, count);
    if (end - first == kBlock) {
      int32_t any = 0;
      for (int64_t i = 0; i < kBlock; ++i) any |= may(first + i);
      if (!any) continue;
    }
    for (int64_t i = first; i < end; ++i) {
      places[found] = static_cast<uint32_t>(i);
      found += may(i);
    }
  }
  return found;
}

SYNCMASK_INLINE float dot(const float* a, const float* b, int64_t dim) {
  constexpr int kSums = 4;
  Floats sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * kLanes <= dim; d += kSums * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      Floats left, right;
      widen(a + d + i * kLanes, left);
      widen(b + d + i * kLanes, right);
      sums[i] += left * right;
    }
  }
  const Floats lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  for (; d < dim; ++d) total += a[d] * b[d];
  return total;
}

}  // namespace syncmask
