// float16 and bfloat16, rounded to nearest even, and pairs of them in a register.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gpu {

template <class To, class From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct BFloat16 {
  uint16_t word;
  BFloat16() = default;
  explicit BFloat16(double number) {
    // Rounding to float first must not make a tie: the last bit remembers what was cut off.
    float near = float(number);
    uint32_t word32 = bits<uint32_t>(near);
    if (number == number && std::isfinite(near) && double(near) != number) {
      if (std::fabs(double(near)) > std::fabs(number)) --word32;
      word32 |= 1;
    }
    const uint32_t rounded = word32 + 0x7FFF + (word32 >> 16 & 1);
    word = number == number ? uint16_t(rounded >> 16) : 0x7FFF;
  }
  operator double() const { return bits<float>(uint32_t(word) << 16); }
};

struct Half {
  uint16_t word;
  Half() = default;
  explicit Half(double number) {
    const uint16_t sign = std::signbit(number) ? 0x8000 : 0;
    const double size = std::fabs(number);
    if (number != number) {
      word = 0x7FFF;
    } else if (size >= 65520) {  // half a step beyond the largest
      word = sign | 0x7C00;
    } else {
      int exponent;
      std::frexp(size, &exponent);
      if (size < 0x1p-14) exponent = -13;  // below that the steps stay as they are
      const double steps = std::nearbyint(std::ldexp(size, 11 - exponent));
      // A carry out of the steps raises the exponent, as it should.
      word = uint16_t(sign | (uint16_t(steps) + ((exponent + 13) << 10)));
    }
  }
  operator double() const {
    const int exponent = word >> 10 & 31, steps = word & 0x3FF;
    double size = exponent == 0   ? std::ldexp(steps, -24)
                  : exponent < 31 ? std::ldexp(steps + 1024, exponent - 25)
                  : steps == 0    ? INFINITY
                                  : NAN;
    return word & 0x8000 ? -size : size;
  }
};

template <class Element>
struct Pair {
  Element low, high;
};

}  // namespace gpu
