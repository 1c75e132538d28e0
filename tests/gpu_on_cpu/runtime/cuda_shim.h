// What g++ needs to compile CUDA sources for the fibers. It is included before them; `cuda.py`
// rewrites what is no C++: launches and shared variables.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_launch.h"
#include "fibers.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

#define threadIdx (gpu::thread->index)
#define blockIdx (gpu::block->index)
#define blockDim (gpu::block->grid.threads)
#define gridDim (gpu::block->grid.blocks)

namespace gpu {

struct Configuration {
  dim3 blocks, threads;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Configuration& how,
            Arguments&&... given) {
  std::tuple<std::remove_const_t<Parameters>...> arguments(std::forward<Arguments>(given)...);
  const auto index = [](const dim3& size) { return Index{size.x, size.y, size.z}; };
  const Grid grid{name, index(how.blocks), index(how.threads), how.shared_bytes};
  std::apply(
      [&](auto&... argument) {
        const void* addresses[] = {&argument..., nullptr};
        launch_kernel(reinterpret_cast<const void*>(kernel), grid, addresses,
                      [&] { kernel(argument...); });
      },
      arguments);
}

// A static shared variable; every place that declares one has a `Place` of its own.
template <class T, class Place>
T& shared(Place) {
  static const char identity = 0;
  return *reinterpret_cast<T*>(shared_variable(&identity, sizeof(T)));
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block->shared);
}

template <class T>
T shuffle_from(T value, int from, unsigned mask, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = shuffle(word, from, mask, line);
  memcpy(&value, &word, sizeof value);
  return value;
}

// The lane itself where `from` is outside of its segment of `width` lanes.
inline int within(int from, int width) {
  const int lane = thread->lane(), first = lane & ~(width - 1);
  return from >= first && from < first + width ? from : lane;
}

}  // namespace gpu

#define GPU_LINE int line = __builtin_LINE()

inline void __syncthreads(GPU_LINE) { gpu::barrier(line); }
inline int __syncthreads_count(int predicate, GPU_LINE) { return gpu::barrier(line, predicate); }
inline int __syncthreads_or(int predicate, GPU_LINE) { return gpu::barrier(line, predicate) > 0; }
inline int __syncthreads_and(int predicate, GPU_LINE) {
  return gpu::barrier(line, predicate) == int(blockDim.count());
}
inline void __syncwarp(unsigned mask = ~0u, GPU_LINE) { gpu::sync_warp(mask, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, GPU_LINE) {
  const int first = gpu::thread->lane() & ~(width - 1);
  return gpu::shuffle_from(value, first + (from & (width - 1)), mask, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, GPU_LINE) {
  return gpu::shuffle_from(value, gpu::within(gpu::thread->lane() - int(by), width), mask, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, GPU_LINE) {
  return gpu::shuffle_from(value, gpu::within(gpu::thread->lane() + int(by), width), mask, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, GPU_LINE) {
  return gpu::shuffle_from(value, gpu::within(gpu::thread->lane() ^ by, width), mask, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, GPU_LINE) {
  return gpu::ballot(predicate, mask, line);
}
inline int __any_sync(unsigned mask, int predicate, GPU_LINE) {
  return gpu::ballot(predicate, mask, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, GPU_LINE) {
  return gpu::ballot(predicate, mask, line) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, GPU_LINE) {
  return gpu::match_any(uint64_t(value), mask, line);
}

#define GPU_REDUCTION(NAME, EXPRESSION)                          \
  template <class T>                                             \
  T NAME(unsigned mask, T value, GPU_LINE) {                     \
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>);      \
    const gpu::Fold fold = [](uint32_t first, uint32_t second) { \
      const T a = T(first), b = T(second);                       \
      return uint32_t(EXPRESSION);                               \
    };                                                           \
    return T(gpu::reduce(fold, uint32_t(value), mask, line));    \
  }
GPU_REDUCTION(__reduce_add_sync, a + b)
GPU_REDUCTION(__reduce_min_sync, a < b ? a : b)
GPU_REDUCTION(__reduce_max_sync, a > b ? a : b)
GPU_REDUCTION(__reduce_and_sync, a& b)
GPU_REDUCTION(__reduce_or_sync, a | b)
GPU_REDUCTION(__reduce_xor_sync, a ^ b)
#undef GPU_REDUCTION
#undef GPU_LINE

using std::max;
using std::min;

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class T>
T __ldg(const T* from) {
  return *from;
}

// ThreadSanitizer sees these as what they are.
template <class T, class F>
T gpu_replace(T* at, F next) {
  T old = *reinterpret_cast<volatile T*>(at), value;
  do {
    value = next(old);
  } while (!__atomic_compare_exchange(at, &old, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return gpu_replace(at, [&](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return gpu_replace(at, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  return gpu_replace(at, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  return gpu_replace(at, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> wanted, std::type_identity_t<T> value) {
  return gpu_replace(at, [&](T old) { return old == wanted ? value : old; });
}
