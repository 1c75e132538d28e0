// The scores of sync_topk_mask from logits that are held for one head at a time, [S, width]: key by
// key, the words side by side in vectors. And the best token of each patch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "syncmask/attention.h"
#include "syncmask/selection.h"

namespace syncmask {

// What a thread sums up over the heads of an example; each [S, width], and empty where no rule
// needs it.
struct HeadSums {
  float* means;     // probabilities
  float* shares;    // of the words in each patch, times the probabilities for kDual
  float* weighted;  // probabilities times the distance of each key
};

// shares [S, width]: the softmax over the words that count (1 in `counted`, else 0) of each key's
// logits; 0 at a key that is not valid.
SYNCMASK_INLINE void word_shares(const float* logits, int64_t keys, int64_t width,
                                 const float* counted, float* shares) {
  for (int64_t s = 0; s < keys; ++s) {
    const float* row = logits + s * width;
    float* share = shares + s * width;
    Maximum maximum;
    Floats value, count, total = {};
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      widen(row + lane, value);
      widen(counted + lane, count);
      maximum.take(count == 0.0f ? Floats{} - INFINITY : value);
    }
    const float best = maximum.value(), top = best == -INFINITY ? 0.0f : best;
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      widen(row + lane, value);
      widen(counted + lane, count);
      softmax_weight(value - top, value);
      value = count == 0.0f ? Floats{} : value;
      total += value;
      store(value, share + lane);
    }
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    for (int64_t lane = 0; lane < width; ++lane) share[lane] /= sum == 0.0f ? 1.0f : sum;
  }
}

// Adds a head, whose logits are overwritten. `shares` has room for [S, width] where the rule is not
// kMax; `distance` [S] is null where there is none.
SYNCMASK_INLINE void add_head_scores(float* logits, int64_t keys, int64_t width,
                                     const float* counted, TokenRule rule, const float* distance,
                                     float* factors, float* shares, const HeadSums& sums) {
  if (rule != TokenRule::kMax) word_shares(logits, keys, width, counted, shares);
  exponentials(logits, keys, width, factors);
  add_probabilities(logits, factors, keys, width, sums.means);
  if (rule == TokenRule::kMax && distance == nullptr) return;
  for (int64_t s = 0; s < keys; ++s) {
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t i = s * width + lane;
      const float probability = logits[i] * factors[lane];
      if (distance) sums.weighted[i] += probability * distance[s];
      if (rule == TokenRule::kTextSoftmax) sums.shares[i] += shares[i];
      if (rule == TokenRule::kDual) sums.shares[i] += shares[i] * probability;
    }
  }
}

// `row` [width] becomes the maximum (or sum) over patches of sums [P, width] divided by `heads`.
SYNCMASK_INLINE void over_patches(const float* sums, const bool* patch_valid, int64_t patches,
                                  int64_t width, bool maximum, float heads, float* row) {
  constexpr int64_t kPart = 16;  // patches added up for themselves: that rounds less
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    Floats total = {}, part = {}, value;
    Maximum best;
    for (int64_t p = 0; p < patches; ++p) {
      widen(sums + p * width + lane, value);
      if (patch_valid && !patch_valid[p]) value = Floats{};
      part += value;
      best.take(value);
      if (p % kPart == kPart - 1 || p == patches - 1) {
        total += part;
        part = Floats{};
      }
    }
    if (maximum && patches > 0) best.lanes(total);
    store(total / heads, row + lane);
  }
}

// The scores of both sides from sums over `heads` heads, of which `sums` starts at the first patch.
SYNCMASK_INLINE void finish_scores(const HeadSums& sums, const float* counted,
                                   const bool* patch_valid, int64_t patches, int64_t tokens,
                                   int64_t width, int64_t cls_row, TokenRule rule, float heads,
                                   float* row, float* patch_scores, float* token_scores) {
  float words = 0.0f;
  for (int64_t t = 0; t < tokens; ++t) words += counted[t];
  words = std::max(words, 1.0f);
  const float* means = sums.weighted ? sums.weighted : sums.means;
  for (int64_t p = 0; p < patches; ++p) {
    const float* mean = means + p * width;
    float total = cls_row >= 0 && cls_row < tokens ? mean[cls_row] : 0.0f;
    if (cls_row < 0) {
      for (int64_t t = 0; t < tokens; ++t) total += counted[t] == 0.0f ? 0.0f : mean[t];
      total /= words;
    }
    patch_scores[p] = patch_valid && !patch_valid[p] ? 0.0f : total / heads;
  }
  const float* scored = rule == TokenRule::kMax ? sums.means : sums.shares;
  over_patches(scored, patch_valid, patches, width, rule != TokenRule::kDual, heads, row);
  for (int64_t t = 0; t < tokens; ++t) token_scores[t] = counted[t] == 0.0f ? 0.0f : row[t];
}

// The best of `tokens` similarities and its first token; NaN is the best. 0 and -1 without a valid
// token.
SYNCMASK_INLINE void best_token(const float* row, const bool* valid, int64_t tokens, float* score,
                                int64_t* id) {
  float best = -INFINITY;
  int64_t best_id = -1;
  for (int64_t t = 0; t < tokens; ++t) {
    if (valid && !valid[t]) continue;
    if (best_id < 0 || row[t] > best || (row[t] != row[t] && best == best)) {
      best = row[t];
      best_id = t;
    }
  }
  *score = best_id < 0 ? 0.0f : best;
  *id = best_id;
}

}  // namespace syncmask
