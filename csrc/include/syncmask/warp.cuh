// What warps and blocks do together, and the types they read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace syncmask {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kLanes; }
__device__ __forceinline__ int warp_count() { return static_cast<int>(blockDim.x) / kLanes; }

// Stored values as float32.
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// The larger number, NaN where one is, as torch.maximum.
__device__ __forceinline__ float larger(float a, float b) { return a != a || a > b ? a : b; }

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The threads that share a row: a warp, or all warps of a block.
template <bool kBlock>
class Team {
 public:
  static __device__ __forceinline__ int64_t index() {
    return kBlock ? blockIdx.x : int64_t{blockIdx.x} * warp_count() + warp_id();
  }
  static __device__ __forceinline__ int warps() { return kBlock ? warp_count() : 1; }
  static __device__ __forceinline__ int warp() { return kBlock ? warp_id() : 0; }
  static __device__ __forceinline__ int threads() { return warps() * kLanes; }
  static __device__ __forceinline__ int thread() { return warp() * kLanes + lane_id(); }

  static __device__ __forceinline__ void sync() {
    if constexpr (kBlock) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  __device__ __forceinline__ int sum(int value) {
    const int total = __reduce_add_sync(kAllLanes, value);
    return kBlock ? __reduce_add_sync(kAllLanes, of_warps(total)) : total;
  }

  // The sum over the warps before the caller's.
  __device__ __forceinline__ int sum_before(int value) {
    if constexpr (!kBlock) return 0;
    const int total = of_warps(__reduce_add_sync(kAllLanes, value));
    return __reduce_add_sync(kAllLanes, lane_id() < warp() ? total : 0);
  }

 private:
  // Hands lane i the value of warp i. Two sets of slots by turns, so that one barrier is enough.
  __device__ __forceinline__ int of_warps(int value) {
    __shared__ int slots[2][kMaxWarps];
    turn_ ^= 1;
    if (lane_id() == 0) slots[turn_][warp()] = value;
    __syncthreads();
    return lane_id() < warps() ? slots[turn_][lane_id()] : 0;
  }

  int turn_ = 0;
};

}  // namespace syncmask
