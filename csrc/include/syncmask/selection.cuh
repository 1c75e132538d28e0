// The exact selection of the best positions of a row, by a warp or, if the row is long, by a block.
#pragma once

#include <climits>

#include "syncmask/order.h"
#include "syncmask/warp.cuh"

namespace syncmask {

// A position as it is ranked: by its key, 0 where it is excluded, then by its leader. The pieces of
// a word all have the key of their best and the first as leader; others lead themselves.
struct Candidate {
  uint32_t key;
  int leader;
};

// The scores of a row and what else ranks its positions; pointers but the first may be null.
template <typename T>
struct Scores {
  const T* scores;
  const float* noise;
  const bool* valid;
  const Candidate* pieces;  // of words; in place of all the others
  int size;
  bool largest;

  __device__ __forceinline__ Scores row(int64_t index) const {
    const int64_t begin = index * size;
    return {scores + begin,
            noise ? noise + begin : nullptr,
            valid ? valid + begin : nullptr,
            pieces ? pieces + begin : nullptr,
            size,
            largest};
  }

  __device__ __forceinline__ uint32_t key(int position) const {
    if (valid && !valid[position]) return 0;
    const float score = widen(scores[position]);
    return order_key(noise ? score + noise[position] : score, largest);
  }

  __device__ __forceinline__ Candidate candidate(int position) const {
    if (position >= size) return {0, position};
    return pieces ? pieces[position] : Candidate{key(position), position};
  }
};

// The piece at a position: pieces with equal ids are one word, negative ids are excluded.
__device__ __forceinline__ Candidate piece(const Scores<float>& scores, const int64_t* word_ids,
                                           int position) {
  const int64_t word = word_ids[position];
  Candidate found{word < 0 ? 0 : scores.key(position), position};
  if (found.key == 0) return found;
  for (int other = 0; other < scores.size; ++other) {
    if (word_ids[other] != word) continue;
    const uint32_t key = scores.key(other);
    found.key = max(found.key, key);
    if (key != 0) found.leader = min(found.leader, other);
  }
  return found;
}

// What a selection takes: keys above this one, and the same key up to the last leader.
struct Cut {
  uint32_t key;
  int last;

  __device__ __forceinline__ bool takes(const Candidate& candidate) const {
    return candidate.key > key || (candidate.key == key && candidate.leader <= last);
  }
};

// A row as its team sees it: each warp has a run of positions, 32 side by side at a time. Every
// thread holds kHeld candidates in registers; with kHeld = 0 it reads any number of them anew
// whenever it needs them.
template <bool kBlock, int kHeld, typename T>
class Row {
 public:
  __device__ __forceinline__ Row(Team<kBlock>& team, const Scores<T>& scores)
      : team_(team), scores_(scores) {
    const int slice = Team<kBlock>::threads();
    steps_ = kHeld > 0 ? kHeld : (scores.size + slice - 1) / slice;
    first_ = Team<kBlock>::warp() * steps_ * kLanes + lane_id();
#pragma unroll
    for (int step = 0; step < kHeld; ++step) held_[step] = scores_.candidate(position(step));
  }

  // Candidates that lead and that the cut takes, in the whole row.
  __device__ __forceinline__ int count(const Cut& cut) {
    int taken = 0;
#pragma unroll kUnroll
    for (int step = 0; step < steps(); ++step) {
      const Candidate candidate = at(step);
      taken += candidate.leader == position(step) && cut.takes(candidate);
    }
    return team_.sum(taken);
  }

  // The cut that takes the `wanted` first of `available` candidates, found bit by bit.
  __device__ __forceinline__ Cut find_cut(int wanted, int available) {
    Cut cut{0, INT_MAX};
    int reached = available;
    for (uint32_t bit = 0x80000000u; bit != 0 && reached != wanted; bit >>= 1) {
      const Cut raised{cut.key | bit, INT_MAX};
      const int taken = count(raised);
      if (taken < wanted) continue;
      cut = raised;
      reached = taken;
    }
    if (reached != wanted) cut.last = static_cast<int>((1u << (32 - __clz(scores_.size))) - 1);
    for (int bit = cut.last / 2 + 1; bit != 0 && reached != wanted; bit >>= 1) {
      const Cut lowered{cut.key, cut.last - bit};
      const int taken = count(lowered);
      if (taken < wanted) continue;
      cut = lowered;
      reached = taken;
    }
    cut.key = max(cut.key, 1u);
    return cut;
  }

  // Writes the mask and the first `width` positions taken, ascending, then -1.
  __device__ __forceinline__ void write(const Cut& cut, bool* mask, int64_t* ids, int64_t width) {
    int taken = 0;
#pragma unroll kUnroll
    for (int step = 0; step < steps(); ++step) taken += cut.takes(at(step));
    int listed = team_.sum_before(taken);
    const unsigned lanes_before = (1u << lane_id()) - 1;
#pragma unroll kUnroll
    for (int step = 0; step < steps(); ++step) {
      const bool take = cut.takes(at(step));
      const unsigned takers = __ballot_sync(kAllLanes, take);
      const int slot = listed + __popc(takers & lanes_before);
      if (position(step) < scores_.size) mask[position(step)] = take;
      if (take && slot < width) ids[slot] = position(step);
      listed += __popc(takers);
    }
    const int total = team_.sum(taken);
    for (int64_t slot = total + Team<kBlock>::thread(); slot < width;
         slot += Team<kBlock>::threads()) {
      ids[slot] = -1;
    }
  }

 private:
  static constexpr int kUnroll = kHeld > 0 ? kHeld : 1;

  __device__ __forceinline__ int steps() const { return kHeld > 0 ? kHeld : steps_; }
  __device__ __forceinline__ int position(int step) const { return first_ + step * kLanes; }
  __device__ __forceinline__ Candidate at(int step) const {
    if constexpr (kHeld > 0) return held_[step];
    return scores_.candidate(position(step));
  }

  Team<kBlock>& team_;
  const Scores<T> scores_;
  int steps_, first_;
  Candidate held_[kHeld > 0 ? kHeld : 1];
};

template <int kHeld, bool kBlock, typename T>
__device__ __forceinline__ void select_row(Team<kBlock>& team, const Scores<T>& scores,
                                           const Count& count, int64_t index, bool* mask,
                                           int64_t* ids) {
  Row<kBlock, kHeld, T> row(team, scores);
  const int available = row.count(Cut{1, INT_MAX});
  const int wanted = static_cast<int>(count.of(index, available));
  row.write(row.find_cut(wanted, available), mask, ids, count.width);
}

template <typename T, bool kBlock, int kHeld>
__global__ void __launch_bounds__(kBlock ? kMaxWarps * kLanes : 128, 1)
    topk_kernel(Scores<T> scores, int64_t rows, Count count, bool* mask, int64_t* ids) {
  Team<kBlock> team;
  const int64_t index = team.index();
  if (index >= rows) return;
  select_row<kHeld>(team, scores.row(index), count, index, mask + index * scores.size,
                    ids + index * count.width);
}

// One side of sync_topk_mask. Its scores come as the parts [rows, blocks, size] of tiles; pointers
// to what is optional may be null.
struct Side {
  const float* parts;
  int blocks, size;
  bool by_max;          // parts are combined by maximum, else summed
  float divisor;        // of the combined parts
  const bool* averaged;  // [rows, words]: divides also by the number of these
  int words;            // 0: it does not
  const float* noise;
  const bool* valid;
  const int64_t* word_ids;
  Candidate* pieces;  // room for [rows, size] where there are word_ids
  Count count;
  bool* mask;
  int64_t* ids;
  float* scores;
};

template <int kHeld, bool kBlock>
__device__ __forceinline__ void select_side(Team<kBlock>& team, const Side& side, int64_t index) {
  float divisor = side.divisor;
  if (side.words > 0) {
    int words = 0;
    for (int i = team.thread(); i < side.words; i += team.threads()) {
      words += side.averaged == nullptr || side.averaged[index * side.words + i];
    }
    divisor *= static_cast<float>(max(team.sum(words), 1));
  }
  for (int i = team.thread(); i < side.size; i += team.threads()) {
    const float* part = side.parts + index * side.blocks * side.size + i;
    float score = side.blocks > 0 ? *part : 0.0f;
    for (int block = 1; block < side.blocks; ++block) {
      part += side.size;
      score = side.by_max ? larger(score, *part) : score + *part;
    }
    side.scores[index * side.size + i] = score / divisor;
  }
  team.sync();
  Scores<float> scores{side.scores, side.noise, side.valid, nullptr, side.size, true};
  scores = scores.row(index);
  if (side.word_ids != nullptr) {
    Candidate* pieces = side.pieces + index * side.size;
    for (int i = team.thread(); i < side.size; i += team.threads()) {
      pieces[i] = piece(scores, side.word_ids + index * side.size, i);
    }
    team.sync();
    scores.pieces = pieces;
  }
  select_row<kHeld>(team, scores, side.count, index, side.mask + index * side.size,
                    side.ids + index * side.count.width);
}

// Teams of blocks with y = 0 select patches, the others words.
template <bool kBlock, int kHeld>
__global__ void __launch_bounds__(kBlock ? kMaxWarps * kLanes : 128, 1)
    select_kernel(Side patches, Side words, int64_t rows) {
  Team<kBlock> team;
  const int64_t index = team.index();
  if (index >= rows) return;
  const Side side = blockIdx.y == 0 ? patches : words;
  select_side<kHeld>(team, side, index);
}

}  // namespace syncmask
