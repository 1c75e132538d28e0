// Similarities of one example to many: bounds from a byte per value, and the exact ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "syncmask/vector.h"

namespace syncmask {

constexpr int64_t kCoarseWidth = 32;  // rows of bytes are padded with zeros to a multiple of this
constexpr int kByteMax = 127;
constexpr float kSmallest = 1e-15f, kLargest = 1e15f;  // outside of them a bound could overflow

// The largest magnitude of a row; NaN where the row has none that bytes can stand for.
SYNCMASK_INLINE float magnitude(const float* row, int64_t dim) {
  float most = 0.0f;
  for (int64_t d = 0; d < dim; ++d) most = larger(most, std::fabs(row[d]));
  return most >= kSmallest && most <= kLargest ? most : NAN;
}

// A row as bytes, which times the scale that is returned are within half a scale of it. The scale
// is NaN, and so are all bounds, where the row has no such bytes.
SYNCMASK_INLINE float coarsen(const float* row, int64_t dim, int8_t* bytes) {
  const float most = magnitude(row, dim);
  for (int64_t d = 0; d < dim; ++d) {
    bytes[d] = most == most ? static_cast<int8_t>(std::lrintf(row[d] * (kByteMax / most))) : 0;
  }
  return most / kByteMax;
}

// A row that many are compared with: times `scale` the values are it, as near as 16 bits allow.
// Similarities that follow from the values are off by at most `error` scales of the other row.
struct Query {
  int16_t* values;
  float scale, error;

  SYNCMASK_INLINE void read(const float* row, int64_t dim, int64_t width) {
    const float most = magnitude(row, dim);
    // So large that no sum of products overflows 32 bits.
    const float top = std::min<int64_t>(INT16_MAX, INT32_MAX / (kByteMax * width));
    float sum = 0.0f;
    for (int64_t d = 0; d < dim; ++d) {
      values[d] = most == most ? static_cast<int16_t>(std::lrintf(row[d] * (top / most))) : 0;
      sum += std::fabs(row[d]);
    }
    scale = most / top;
    // Half a scale of the bytes, half a scale of the values, and what floats round, here and in
    // the exact similarity.
    const float roundings = 0x1p-23f * kByteMax * static_cast<float>(dim + 8);
    error = sum * (0.5f + roundings) + 0.51f * scale * kByteMax * static_cast<float>(dim);
  }
};

// What the similarities of rows are at least and at most.
SYNCMASK_INLINE void bound(const Query& query, const int8_t* rows, const float* scales,
                           int64_t count, int64_t width, float* low, float* high) {
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* row = rows + i * width;
    int32_t sum = 0;
    for (int64_t d = 0; d < width; ++d) {
      sum += static_cast<int32_t>(query.values[d]) * static_cast<int16_t>(row[d]);
    }
    const float middle = query.scale * static_cast<float>(sum);
    low[i] = scales[i] * (middle - query.error);
    high[i] = scales[i] * (middle + query.error);
  }
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
