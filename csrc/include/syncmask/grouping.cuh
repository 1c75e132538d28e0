// The chain of grouped_order, by one block: every step needs the one before it.
#pragma once

#include "syncmask/grouping_rank.h"
#include "syncmask/warp.cuh"

namespace syncmask {

constexpr int kTeamLanes = 8;  // share a row: they read whole sectors of it

template <typename T>
struct Chain {
  const T* image;           // [size, dim]
  const T* text;            // [size, dim]
  const int64_t* item_ids;  // [size] or null
  int64_t dim;
  int size, start, window;
  bool semi_hard;
  int* unused;   // room for [size]: the unused examples, in any order
  int* place;    // room for [size]: where they stand there
  int* free_at;  // room for [size]: the step from which on an example's item may come again
  int64_t* order;
};

// The similarity of two rows, to all lanes of a team.
template <typename T>
__device__ __forceinline__ float team_dot(const T* from, const T* to, int64_t dim) {
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t d = lane_id() % kTeamLanes; d < dim; d += kTeamLanes) {
    sum += widen(from[d]) * widen(to[d]);
  }
#pragma unroll
  for (int distance = kTeamLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

__device__ __forceinline__ uint64_t block_max(uint64_t value) {
  __shared__ uint64_t of_warps[kMaxWarps];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  if (lane_id() == 0) of_warps[warp_id()] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < warp_count(); ++warp) value = max(value, of_warps[warp]);
  return value;
}

// The example to take at this step, which comes after `current` in the direction from -> to.
template <typename T>
__device__ __forceinline__ int next_example(const Chain<T>& chain, const T* from, const T* to,
                                            int current, int count, int step) {
  const T* query = from + current * chain.dim;
  Wish wish{chain.semi_hard, INFINITY};
  if (chain.semi_hard) wish.ceiling = team_dot(query, to + current * chain.dim, chain.dim);
  const int teams = static_cast<int>(blockDim.x) / kTeamLanes;
  uint64_t best = 0;
  // All lanes of a warp go round equally often.
  for (int first = 0; first < count; first += teams) {
    const int i = first + static_cast<int>(threadIdx.x) / kTeamLanes;
    const bool present = i < count;
    const int example = present ? chain.unused[i] : 0;
    const float similarity =
        team_dot(query, to + example * chain.dim, present ? chain.dim : int64_t{0});
    if (!present) continue;
    bool apart = true;
    if (chain.item_ids != nullptr) {
      const bool same = chain.item_ids[example] == chain.item_ids[current];
      const int free_at = same ? step - 1 + chain.window : chain.free_at[example];
      apart = free_at <= step;
      if (same && lane_id() % kTeamLanes == 0) chain.free_at[example] = free_at;
    }
    best = max(best, apart ? wish.rank(similarity, example) : Wish::last_resort(example));
  }
  return static_cast<int>(Wish::example(block_max(best)));
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps * kLanes, 1) chain_kernel(Chain<T> chain) {
  for (int i = static_cast<int>(threadIdx.x); i < chain.size; i += static_cast<int>(blockDim.x)) {
    chain.unused[i] = i;
    chain.place[i] = i;
    chain.free_at[i] = 0;
  }
  __syncthreads();
  int current = chain.start;
  for (int step = 1; step <= chain.size; ++step) {
    const int count = chain.size - step;
    if (threadIdx.x == 0) {
      chain.order[step - 1] = current;
      const int place = chain.place[current], last = chain.unused[count];
      chain.unused[place] = last;
      chain.place[last] = place;
    }
    __syncthreads();
    if (count == 0) return;
    const T* from = step % 2 == 1 ? chain.image : chain.text;
    const T* to = step % 2 == 1 ? chain.text : chain.image;
    current = next_example(chain, from, to, current, count, step);
  }
}

}  // namespace syncmask
