// Eight floats at a time, in GCC's portable vector types: the compiler lowers them to the instruction
// set of the function they are inlined into.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define SYNCMASK_INLINE inline __attribute__((always_inline))

// One copy of the function per instruction set; the loader takes the best the processor has.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SYNCMASK_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SYNCMASK_CLONES
#endif

namespace syncmask {

constexpr int kLanes = 8;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

// Storage types of half-width floats; arithmetic is always float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Stored values as float32, one or eight at a time.
SYNCMASK_INLINE float widen(float value) { return value; }

SYNCMASK_INLINE float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

SYNCMASK_INLINE float widen(Half value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  float wide;
  std::memcpy(&wide, &magnitude, sizeof wide);
  wide *= 0x1p112f;  // rebiases the exponent, which also normalises the denormals of half
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  bits |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  bits |= static_cast<uint32_t>(value.bits & 0x8000) << 16;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <typename T>
SYNCMASK_INLINE void widen(const T* from, Floats& to) {
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = widen(from[lane]);
}

SYNCMASK_INLINE void widen(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }

SYNCMASK_INLINE void store(const Floats& from, float* to) { std::memcpy(to, &from, sizeof from); }

// Lane by lane, which also rounds less than one long sum.
SYNCMASK_INLINE float sum(const float* values, int64_t n) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats value;
    widen(values + i, value);
    sums += value;
  }
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  for (; i < n; ++i) total += values[i];
  return total;
}

// The larger number, NaN where one is, as torch.maximum.
SYNCMASK_INLINE float larger(float a, float b) { return a != a || a > b ? a : b; }

// A running maximum of vectors, NaN where a value is.
struct Maximum {
  Floats best = Floats{} - INFINITY;
  Ints nan = {};

  SYNCMASK_INLINE void take(const Floats& value) {
    nan |= value != value;
    best = value > best ? value : best;
  }

  SYNCMASK_INLINE float value() const {
    float top = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) top = larger(top, nan[lane] ? NAN : best[lane]);
    return top;
  }
};

}  // namespace syncmask
