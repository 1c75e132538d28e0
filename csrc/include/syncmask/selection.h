// Scores of patches and words from cross-attention, and the exact selection of the best of a row.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "syncmask/count.h"
#include "syncmask/heads.h"
#include "syncmask/vector.h"

namespace syncmask {

constexpr int32_t kExcluded = INT32_MIN;

// Integers in the order of (excluded, NaN, -score), the larger the earlier. Integers keep
// denormals apart where the processor flushes them to zero. Returns how many are valid.
SYNCMASK_INLINE int64_t order_keys(const float* scores, const float* noise, const bool* valid,
                                   int64_t n, bool largest, int32_t* keys) {
  const uint32_t flip = largest ? 0u : 0x80000000u;
  for (int64_t i = 0; i < n; ++i) {
    const float score = noise ? scores[i] + noise[i] : scores[i];
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    bits ^= flip;
    const int32_t magnitude = bits & 0x7fffffffu;
    const int32_t key = static_cast<int32_t>(bits) < 0 ? -magnitude : magnitude;
    keys[i] = magnitude > 0x7f800000 ? kExcluded + 1 : key;
  }
  if (valid == nullptr) return n;
  int64_t available = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = valid[i] ? keys[i] : kExcluded;
    available += valid[i];
  }
  return available;
}

SYNCMASK_INLINE int64_t count_at_least(const int32_t* keys, int64_t n, int32_t threshold) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += 1 << 20) {  // 32-bit counters vectorise
    const int64_t end = begin + (1 << 20) < n ? begin + (1 << 20) : n;
    int32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += keys[i] >= threshold;
    total += count;
  }
  return total;
}

// The least and the most of the keys that are not excluded.
SYNCMASK_INLINE void bounds_of(const int32_t* keys, int64_t n, int32_t* least, int32_t* most) {
  *least = INT32_MAX;
  *most = kExcluded;
  int64_t i = 0;
  if (n >= kLanes) {
    Ints low = Ints{} + INT32_MAX, high = Ints{} + kExcluded, key;
    for (; i + kLanes <= n; i += kLanes) {
      std::memcpy(&key, keys + i, sizeof key);
      high = key > high ? key : high;
      key = key == kExcluded ? Ints{} + INT32_MAX : key;
      low = key < low ? key : low;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      *least = low[lane] < *least ? low[lane] : *least;
      *most = high[lane] > *most ? high[lane] : *most;
    }
  }
  for (; i < n; ++i) {
    *most = keys[i] > *most ? keys[i] : *most;
    if (keys[i] != kExcluded && keys[i] < *least) *least = keys[i];
  }
}

// The key of the k-th best position, found bit by bit, and the surplus of positions that share this
// key and lie behind the k best. 1 <= k <= valid positions.
SYNCMASK_INLINE int32_t threshold_of(const int32_t* keys, int64_t n, int64_t k, int64_t* surplus) {
  int32_t least, most;
  bounds_of(keys, n, &least, &most);
  // In unsigned order, which is that of the keys with the sign bit flipped. The bits that the least
  // and the most have in common are those of every key between them.
  const uint32_t differing = static_cast<uint32_t>(least ^ most);
  uint32_t bit = differing ? 0x80000000u >> __builtin_clz(differing) : 0;
  uint32_t prefix = (static_cast<uint32_t>(most) ^ 0x80000000u) & ~(2 * bit - (bit != 0));
  int64_t reached = n;
  for (; bit != 0 && reached != k; bit >>= 1) {
    const int32_t candidate = static_cast<int32_t>((prefix | bit) ^ 0x80000000u);
    const int64_t count = count_at_least(keys, n, candidate);
    if (count < k) continue;
    prefix |= bit;
    reached = count;
  }
  const int32_t threshold = static_cast<int32_t>(prefix ^ 0x80000000u);
  *surplus = (bit == 0 ? count_at_least(keys, n, threshold) : reached) - k;
  return threshold;
}

// Lists the first `width` marked positions in ascending order, then -1.
SYNCMASK_INLINE void list_ids(const bool* mask, int64_t n, int64_t* ids, int64_t width) {
  int64_t listed = 0;
  for (int64_t i = 0; i < n && listed < width; ++i) {
    ids[listed] = i;  // the next one overwrites it where the position is not marked
    listed += mask[i];
  }
  while (listed < width) ids[listed++] = -1;
}

// Marks the k best of n keys.
SYNCMASK_INLINE void mark_best(const int32_t* keys, int64_t n, int64_t k, bool* mask) {
  if (k == 0) {
    std::memset(mask, 0, n * sizeof(bool));
    return;
  }
  int64_t surplus = 0;
  const int32_t threshold = threshold_of(keys, n, k, &surplus);
  for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] >= threshold;
  for (int64_t i = n; surplus > 0; surplus -= keys[i] == threshold) {
    if (keys[--i] == threshold) mask[i] = false;
  }
}

// Marks whole words: pieces with equal ids are one word, whose key is that of its best piece and
// whose position is that of its first piece. `leaders` and `words` hold n entries.
SYNCMASK_INLINE void mark_words(int32_t* keys, const int64_t* word_ids, int64_t n,
                                  const Count& count, int64_t row, int64_t* leaders, bool* words,
                                  bool* mask) {
  int64_t available = 0;
  for (int64_t i = 0; i < n; ++i) {
    leaders[i] = -1;
    if (word_ids[i] < 0) keys[i] = kExcluded;
    if (keys[i] == kExcluded) continue;
    int64_t first = 0;
    while (first < i && (leaders[first] != first || word_ids[first] != word_ids[i])) ++first;
    leaders[i] = first;
    if (first == i) {
      ++available;
    } else {
      keys[first] = keys[i] > keys[first] ? keys[i] : keys[first];
      keys[i] = kExcluded;
    }
  }
  mark_best(keys, n, count.of(row, available), words);
  for (int64_t i = 0; i < n; ++i) mask[i] = leaders[i] >= 0 && words[leaders[i]];
}

// ---- scores ----

enum class TokenRule : int64_t { kMax = 0, kTextSoftmax = 1, kDual = 2 };

// What the scores of one example are computed from.
template <typename T>
struct Attention {
  Planes<T> planes;
  int64_t tokens, patches;
  const float* lse;         // [planes, tokens] or null
  const bool* token_valid;  // or null
  const bool* patch_valid;  // or null
  int64_t cls_row;          // or -1: the patch score is the mean over valid words
  TokenRule rule;

  SYNCMASK_INLINE bool counts(int64_t token) const {
    return token_valid == nullptr || token_valid[token];
  }
};

// The largest of a row of sums over planes, 0 standing for excluded patches (where the row is set to
// it); NaN where there is one. Where `totals` is given, the row is added to it.
template <typename T>
SYNCMASK_INLINE float take_row(const Attention<T>& a, float* row, float* totals) {
  if (a.patch_valid) {
    for (int64_t p = 0; p < a.patches; ++p) row[p] = a.patch_valid[p] ? row[p] : 0.0f;
  }
  Maximum maximum;
  Floats sum, total;
  int64_t p = 0;
  for (; p + kLanes <= a.patches; p += kLanes) {
    widen(row + p, sum);
    maximum.take(sum);
    if (totals == nullptr) continue;
    widen(totals + p, total);
    store(total + sum, totals + p);
  }
  float best = maximum.value();
  for (; p < a.patches; ++p) {
    best = larger(best, row[p]);
    if (totals) totals[p] += row[p];
  }
  return best;
}

// patch_scores becomes the mean over valid words of the head mean, or its CLS row; token_scores its
// maximum over patches where the rule is kMax. Reads the row of a valid word once, and no other row
// but that of the CLS. `words` holds a number a word, `sums` a float a patch for words_at_once.
template <typename T>
SYNCMASK_INLINE void score_mean(const Attention<T>& a, float* patch_scores, float* token_scores,
                                int64_t* words, float* sums) {
  const bool by_max = a.rule == TokenRule::kMax && a.patches > 0;
  int64_t read = 0, summed = 0;
  for (int64_t t = 0; t < a.tokens; ++t) {
    token_scores[t] = 0.0f;
    if ((a.counts(t) && (by_max || a.cls_row < 0)) || t == a.cls_row) words[read++] = t;
  }
  std::memset(patch_scores, 0, a.patches * sizeof(float));
  const float planes = static_cast<float>(a.planes.count);
  const int64_t chunk = words_at_once(a.patches);
  for (int64_t i = 0; i < read; ++i) {
    if (i % chunk == 0) {
      sum_planes(a.planes, words + i, std::min(chunk, read - i), a.patches, sums);
    }
    const bool summed_too = a.cls_row < 0 || words[i] == a.cls_row;
    float* row = sums + i % chunk * a.patches;
    const float best = take_row(a, row, summed_too ? patch_scores : nullptr);
    if (by_max && a.counts(words[i])) token_scores[words[i]] = best / planes;
    summed += summed_too;
  }
  const float divisor = planes * static_cast<float>(summed);
  for (int64_t p = 0; summed > 0 && p < a.patches; ++p) patch_scores[p] /= divisor;
}

// The factor that turns a probability of each word into its unnormalised weight among words:
// exp(lse) up to a common factor, 1 without lse, 0 for words that do not count.
template <typename T>
SYNCMASK_INLINE void word_factors(const Attention<T>& a, int64_t plane, float* factors) {
  const float* lse = a.lse ? a.lse + plane * a.tokens : nullptr;
  float top = -INFINITY;
  for (int64_t t = 0; lse && t < a.tokens; ++t) {
    if (a.counts(t) && !(lse[t] <= top)) top = lse[t];  // NaN wins, and stays
    if (top != top) break;
  }
  if (top == -INFINITY) top = 0.0f;
  for (int64_t t = 0; t < a.tokens; ++t) {
    factors[t] = !a.counts(t) ? 0.0f : lse ? std::exp(lse[t] - top) : 1.0f;
  }
}

// token_scores by the rules that let a patch choose among words. Of the rows below `totals` holds a
// float a patch, `factors` one a word, `shares` one a word and patch.
template <typename T>
SYNCMASK_INLINE void score_shares(const Attention<T>& a, float* token_scores, float* totals,
                                  float* factors, float* shares) {
  const bool dual = a.rule == TokenRule::kDual;
  std::memset(shares, 0, a.tokens * a.patches * sizeof(float));
  for (int64_t plane = 0; plane < a.planes.count; ++plane) {
    word_factors(a, plane, factors);
    std::memset(totals, 0, a.patches * sizeof(float));
    for (int64_t t = 0; t < a.tokens; ++t) {
      const T* row = a.planes.first[plane] + t * a.planes.row;
      if (factors[t] == 0.0f) continue;
      for (int64_t p = 0; p < a.patches; ++p) totals[p] += widen(row[p]) * factors[t];
    }
    // A patch that no word looks at is shared by none.
    for (int64_t p = 0; p < a.patches; ++p) totals[p] = totals[p] == 0.0f ? 1.0f : totals[p];
    for (int64_t t = 0; t < a.tokens; ++t) {
      const T* row = a.planes.first[plane] + t * a.planes.row;
      float* sums = shares + t * a.patches;
      if (!a.counts(t)) continue;
      for (int64_t p = 0; p < a.patches; ++p) {
        const float value = widen(row[p]);
        const float share = (factors[t] == 0.0f ? 0.0f : value * factors[t]) / totals[p];
        sums[p] += dual ? share * value : share;
      }
    }
  }
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (!a.counts(t) || a.patches == 0) continue;
    float* row = shares + t * a.patches;
    const float best = take_row(a, row, nullptr);
    token_scores[t] = (dual ? sum(row, a.patches) : best) / static_cast<float>(a.planes.count);
  }
}

}  // namespace syncmask
