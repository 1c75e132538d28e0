// A negative for each row of a similarity matrix.
#pragma once

#include <cmath>
#include <cstdint>

#include "syncmask/philox.h"
#include "syncmask/selection.h"

namespace syncmask {

enum class Mode : int64_t { kMultinomial = 0, kHardest = 1, kSemiHard = 2 };

// What decides which of n columns a row may choose; null where nothing of the kind does.
struct Barred {
  const bool* exclude;
  const int64_t* col_ids;
  int64_t row_id;
  int64_t positive;  // or -1
};

// Of the columns below the positive by more than the margin, which one semi_hard takes.
struct Below {
  float margin;
  int64_t num, den;
};

// The keys of the candidates, in the order of sim + noise; kExcluded for other columns.
SYNCMASK_INLINE void candidate_keys(const float* sim, const float* noise, int64_t n,
                                    const Barred& barred, int32_t* keys) {
  order_keys(sim, noise, nullptr, n, true, keys);
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = sim[i] > -INFINITY ? keys[i] : kExcluded;  // NaN is not
  }
  if (barred.exclude) {
    for (int64_t i = 0; i < n; ++i) keys[i] = barred.exclude[i] ? kExcluded : keys[i];
  }
  if (barred.col_ids) {
    for (int64_t i = 0; i < n; ++i) {
      keys[i] = barred.col_ids[i] == barred.row_id ? kExcluded : keys[i];
    }
  }
  if (barred.positive >= 0) keys[barred.positive] = kExcluded;
}

// The first of equal keys.
SYNCMASK_INLINE int64_t position_of(int32_t key, const int32_t* keys) {
  int64_t i = 0;
  while (keys[i] != key) ++i;
  return i;
}

// The noise of a row, rounded up to whole kRandomWords.
SYNCMASK_INLINE void gumbel_row(const PhiloxKey& key, int64_t row, int64_t n, float* noise) {
  uint32_t words[kRandomWords];
  Floats value;
  for (int64_t first = 0; first < n; first += kRandomWords) {
    philox_words(key, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(row), words);
    for (int64_t i = 0; i < kRandomWords; i += kLanes) {
      gumbel(words + i, value);
      store(value, noise + first + i);
    }
  }
}

// Writes the first of the largest keys; false where no key is a candidate's.
SYNCMASK_INLINE bool choose_largest(const int32_t* keys, int64_t n, int64_t* id) {
  int32_t least, most;
  bounds_of(keys, n, &least, &most);
  *id = most == kExcluded ? 0 : position_of(most, keys);
  return most != kExcluded;
}

// Likewise the candidate at the rank that `below` asks for, from the least similar one on. What is
// easier than the ceiling ranks before what is not, so that a rank among the former is one among all
// candidates, and the first is right where nothing is easier.
SYNCMASK_INLINE bool choose_below(const int32_t* keys, int64_t n, float positive,
                                  const Below& below, int64_t* id) {
  const float ceiling = positive - below.margin;
  int32_t ceiling_key;
  order_keys(&ceiling, nullptr, nullptr, 1, true, &ceiling_key);
  const int64_t available = count_at_least(keys, n, kExcluded + 1);
  const int64_t easier = available - count_at_least(keys, n, ceiling_key);
  const int64_t share = (easier * below.num + below.den - 1) / below.den;
  *id = 0;
  if (available == 0) return false;
  int64_t surplus;
  const int32_t threshold = threshold_of(keys, n, available - (share > 1 ? share : 1) + 1, &surplus);
  int32_t least = INT32_MAX;
  for (int64_t i = 0; i < n; ++i) {
    least = keys[i] >= threshold && keys[i] < least ? keys[i] : least;
  }
  *id = position_of(least, keys);
  return true;
}

}  // namespace syncmask
