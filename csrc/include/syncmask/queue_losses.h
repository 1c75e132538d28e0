// Contrast of a row with a block of keys: logits that become exponentials, and these the slopes, in
// their place.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "syncmask/vector.h"

namespace syncmask {

// Keys whose logits, a row's and its teacher's, stay in the first cache between two looks at them.
constexpr int64_t kTileKeys = 1024;

// Values of a tile that are added up first: fewer additions one after the other, for they round.
constexpr int64_t kRun = 128;

// Which keys belong to the row: those of its id. No `ids`: none does.
struct Positives {
  int64_t own;
  const int64_t* ids;
};

struct TileSums {
  float top, total;       // the maximum, and the sum of the exponentials below it
  float mixed;            // the sum of the row's logits by its teacher's exponentials
  float positive, count;  // the sum of the logits of positives, and their number
};

SYNCMASK_INLINE float highest(const float* values, int64_t n) {
  Maximum top;
  for (int64_t i = 0; i < n; i += kLanes) {
    Floats value;
    read(values + i, n - i, -INFINITY, value);
    top.take(value);
  }
  return top.value();
}

// values -> exponentials below their maximum. `sums.mixed` is with those of the teacher, if any.
SYNCMASK_INLINE void exponentials(float* values, const float* teacher, int64_t n, TileSums& sums) {
  sums.top = highest(values, n);
  Floats total = {}, mixed = {};
  for (int64_t begin = 0; begin < n; begin += kRun) {
    Floats run_total = {}, run_mixed = {};
    for (int64_t i = begin; i < std::min(n, begin + kRun); i += kLanes) {
      Floats value, power;
      if (teacher != nullptr) {
        read(values + i, n - i, 0.0f, value);
        read(teacher + i, n - i, 0.0f, power);
        run_mixed += power * value;
      }
      read(values + i, n - i, -INFINITY, value);
      exponential(value - sums.top, power);
      run_total += power;
      write(power, n - i, values + i);
    }
    total += run_total;
    mixed += run_mixed;
  }
  sums.total = across(total);
  sums.mixed = across(mixed);
}

// A tile of a row and, where there is a teacher, of its row.
SYNCMASK_INLINE void contrast_tile(float* row, float* teacher, const Positives& positives, int64_t n,
                                   TileSums& sums, TileSums& teacher_sums) {
  double positive = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; positives.ids != nullptr && i < n; ++i) {
    if (positives.ids[i] != positives.own) continue;
    positive += row[i];
    ++count;
  }
  if (teacher != nullptr) exponentials(teacher, nullptr, n, teacher_sums);
  exponentials(row, teacher, n, sums);
  sums.positive = static_cast<float>(positive);
  sums.count = static_cast<float>(count);
}

// row = scale * row + teacher_scale * teacher, - share for positives
SYNCMASK_INLINE void slope_tile(float* row, const float* teacher, const Positives& positives,
                                int64_t n, float scale, float teacher_scale, float share) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Floats value, other;
    read(row + i, n - i, 0.0f, value);
    value *= scale;
    if (teacher != nullptr) {
      read(teacher + i, n - i, 0.0f, other);
      value += teacher_scale * other;
    }
    write(value, n - i, row + i);
  }
  for (int64_t i = 0; positives.ids != nullptr && i < n; ++i) {
    if (positives.ids[i] == positives.own) row[i] -= share;
  }
}

}  // namespace syncmask
