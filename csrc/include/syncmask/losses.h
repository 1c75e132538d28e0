// Softmax of logits [words, rows] where both the words and the exponentials come block by block:
// a column is a row of the batch, whose logits of all words make one distribution.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "syncmask/vector.h"

namespace syncmask {

// Logits whose words lie `stride` apart.
struct Logits {
  const float* first;
  int64_t stride;
};

// Of every column: the maximum, and the log of the sum of exponentials below it.
struct LogSums {
  const float *top, *log_total;
};

// A tile of logits is looked at twice, and so copied to where it stays in the first cache.
constexpr int64_t kTileWords = 32, kTileColumns = 64;

// The sum of the exponentials of eight columns of a tile below `top`, in few additions one after the
// other, for they round.
SYNCMASK_INLINE void sum_exponentials(const float* tile, const Floats& top, Floats& sum) {
  constexpr int64_t kSums = 4;
  Floats sums[kSums] = {}, value, power;
  for (int64_t w = 0; w < kTileWords; w += kSums) {
    for (int64_t j = 0; j < kSums; ++j) {
      widen(tile + (w + j) * kTileColumns, value);
      exponential(value - top, power);
      sums[j] += power;
    }
  }
  sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// logits += bias (null: none); the running maxima `top` and sums of exponentials below them, `total`,
// take in these words. At most kTileColumns columns.
SYNCMASK_INLINE void add_words(float* logits, int64_t stride, const float* bias, int64_t words,
                               int64_t columns, float* top, float* total) {
  alignas(64) float tile[kTileWords * kTileColumns] = {}, tops[kTileColumns] = {};
  double totals[kTileColumns] = {};
  std::copy(top, top + columns, tops);
  std::copy(total, total + columns, totals);
  for (int64_t begin = 0; begin < words; begin += kTileWords) {
    const int64_t count = std::min(kTileWords, words - begin);
    for (int64_t w = 0; w < count; ++w) {
      float* row = logits + (begin + w) * stride;
      if (bias != nullptr) {
        const float shift = bias[begin + w];
        for (int64_t i = 0; i < columns; ++i) row[i] += shift;
      }
      std::copy(row, row + columns, tile + w * kTileColumns);
    }
    std::fill(tile + count * kTileColumns, tile + kTileWords * kTileColumns, -INFINITY);
    for (int64_t i = 0; i < columns; i += kLanes) {
      Floats value, before, best, kept, sum;
      widen(tops + i, before);
      best = before;
      // NaN is passed over here, and found in the sum.
      for (int64_t w = 0; w < kTileWords; ++w) {
        widen(tile + w * kTileColumns + i, value);
        best = value > best ? value : best;
      }
      exponential(before - best, kept);
      sum_exponentials(tile + i, best, sum);
      store(best, tops + i);
      for (int lane = 0; lane < kLanes; ++lane) {
        totals[i + lane] = totals[i + lane] * kept[lane] + sum[lane];
      }
    }
  }
  std::copy(tops, tops + columns, top);
  std::copy(totals, totals + columns, total);
}

// The soft labels of a block of words: none (`values` null), probabilities, or (with `sums`) logits.
struct SoftLabels {
  Logits values;
  LogSums sums;
};

// The slope of the loss by a logit is mass * softmax - even - alpha * soft.
struct Shares {
  const float* mass;
  float even, alpha;
};

// log of softmax
SYNCMASK_INLINE void log_softmax(const float* logits, const LogSums& sums, int64_t column,
                                 int64_t count, Floats& log_p) {
  Floats top, log_total;
  read(logits + column, count, 0.0f, log_p);
  read(sums.top + column, count, 0.0f, top);
  read(sums.log_total + column, count, 0.0f, log_total);
  log_p = (log_p - top) - log_total;
}

// Sums of log softmax: plain, and weighted by the soft labels.
struct LogSoftmaxSums {
  Floats plain = {}, soft = {};
};

SYNCMASK_INLINE void slope_vector(const float* logits, const LogSums& sums, const float* soft,
                                  const LogSums& soft_sums, const Shares& shares, int64_t column,
                                  int64_t count, float* slope, LogSoftmaxSums& found) {
  Floats log_p, p, mass;
  log_softmax(logits, sums, column, count, log_p);
  read(shares.mass + column, count, 0.0f, mass);
  exponential(log_p, p);
  p = mass * p - shares.even;
  found.plain += log_p;
  if (soft != nullptr) {
    Floats chosen;
    if (soft_sums.top != nullptr) {
      log_softmax(soft, soft_sums, column, count, chosen);
      exponential(chosen, chosen);
    } else {
      read(soft + column, count, 0.0f, chosen);
    }
    p -= shares.alpha * chosen;
    found.soft += chosen * log_p;
  }
  write(p, count, slope + column);
}

// slope [words, columns]; returns the part of the loss that is not due to the labels.
SYNCMASK_INLINE double slope_words(const Logits& logits, const LogSums& sums,
                                   const SoftLabels& soft, const Shares& shares, int64_t words,
                                   int64_t columns, float* slope) {
  double loss = 0.0;
  for (int64_t w = 0; w < words; ++w) {
    const float* row = logits.first + w * logits.stride;
    const float* soft_row = soft.values.first ? soft.values.first + w * soft.values.stride : nullptr;
    LogSoftmaxSums found;
    int64_t column = 0;
    for (; column + kLanes <= columns; column += kLanes) {
      slope_vector(row, sums, soft_row, soft.sums, shares, column, kLanes, slope, found);
    }
    if (column < columns) {
      slope_vector(row, sums, soft_row, soft.sums, shares, column, columns - column, slope, found);
    }
    // A word without a chance, of log softmax -inf, must not meet a share of 0.
    if (shares.even > 0.0f) loss -= shares.even * across(found.plain);
    if (soft_row != nullptr) loss -= shares.alpha * across(found.soft);
    slope += columns;
  }
  return loss;
}

}  // namespace syncmask
