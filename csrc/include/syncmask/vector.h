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

// Floats as stored values, rounded to the nearest, ties to even.
SYNCMASK_INLINE void narrow(float value, float* to) { *to = value; }

SYNCMASK_INLINE void narrow(float value, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value != value ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1);
  to->bits = static_cast<uint16_t>(bits >> 16);
}

SYNCMASK_INLINE void narrow(float value, Half* to) {
  const float magnitude = std::fabs(value);
  uint32_t bits, sign;
  // Adding this aligns the last place of a half, so that the processor rounds there.
  float aligned = magnitude * 0x1p-112f, anchor;
  std::memcpy(&sign, &value, sizeof sign);
  std::memcpy(&bits, &aligned, sizeof bits);
  if (magnitude >= 0x1p-14f) {
    bits += 0xfffu + (bits >> 13 & 1);
    bits = bits >> 13 > 0x7c00u ? 0x7c00u << 13 : bits;
    to->bits = static_cast<uint16_t>(bits >> 13);
  } else {
    anchor = magnitude + 0.5f;
    std::memcpy(&bits, &anchor, sizeof bits);
    to->bits = static_cast<uint16_t>(bits - 0x3f000000u);
  }
  if (value != value) to->bits = 0x7e00u;
  to->bits |= static_cast<uint16_t>(sign >> 16 & 0x8000u);
}

SYNCMASK_INLINE void store(const Floats& from, float* to) { std::memcpy(to, &from, sizeof from); }

template <typename T>
SYNCMASK_INLINE void store(const Floats& from, T* to) {
  for (int lane = 0; lane < kLanes; ++lane) narrow(from[lane], to + lane);
}

// Eight values of which the first `count` are there; the others are `rest`.
SYNCMASK_INLINE void read(const float* from, int64_t count, float rest, Floats& to) {
  if (count >= kLanes) return widen(from, to);
  to = Floats{} + rest;
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = from[lane];
}

SYNCMASK_INLINE void write(const Floats& from, int64_t count, float* to) {
  if (count >= kLanes) return store(from, to);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = from[lane];
}

SYNCMASK_INLINE double across(const Floats& lanes) {
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

constexpr float kLog2E = 1.44269504f;
// Added to an integer, it leaves the exponent of this power of two in the low bits.
constexpr float kToExponent = 0x1.8p23f + 127.0f;

// 2 to the power of `rest`, of at most a half, times the power of two whose exponent `shifted` has.
SYNCMASK_INLINE void power_of_two(const Floats& shifted, const Floats& rest, Floats& power) {
  power = rest * 1.5345812e-4f + 1.3399931e-3f;
  power = power * rest + 9.6184890e-3f;
  power = power * rest + 5.5503288e-2f;
  power = power * rest + 2.4022647e-1f;
  power = power * rest + 6.9314721e-1f;
  power = power * rest + 1.0f;
  Ints exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent <<= 23;
  Floats scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  power *= scale;
}

// e to the power of each lane within 2 units of the last place; 0 below the normal numbers.
SYNCMASK_INLINE void exponential(const Floats& x, Floats& result) {
  const Floats shifted = x * kLog2E + kToExponent, whole = shifted - kToExponent;
  // In two steps, of which the first is exact.
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats power;
  power_of_two(shifted, rest * kLog2E, power);
  result = x < -87.0f ? Floats{} : power;
}

// The exponential of x <= 0 within a unit of the last place of 1, which is what a softmax needs.
SYNCMASK_INLINE void softmax_weight(const Floats& x, Floats& result) {
  const Floats shifted = x * kLog2E + kToExponent, whole = shifted - kToExponent;
  Floats power;
  power_of_two(shifted, x * kLog2E - whole, power);
  result = x < -87.0f ? Floats{} : power;
}

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

  SYNCMASK_INLINE void lanes(Floats& tops) const { tops = nan ? Floats{} + NAN : best; }

  SYNCMASK_INLINE float value() const {
    Floats tops;
    lanes(tops);
    float top = -INFINITY;
    for (int lane = 0; lane < kLanes; ++lane) top = larger(top, tops[lane]);
    return top;
  }
};

}  // namespace syncmask
