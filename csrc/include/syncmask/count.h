// How many positions a row selects, on host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SYNCMASK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SYNCMASK_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace syncmask {

// See Count in backends/request.py.
struct Count {
  const int64_t* k;  // of the rows, or null
  int64_t num, den, width;

  SYNCMASK_HOST_DEVICE int64_t of(int64_t row, int64_t available) const {
    if (den != 0) return (available * num + den - 1) / den;
    const int64_t wanted = k ? k[row] : num;
    return wanted < 0 ? 0 : wanted < available ? wanted : available;
  }
};

}  // namespace syncmask
