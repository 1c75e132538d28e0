// Integers, floating-point numbers and bits. Approximate instructions are as exact as the C
// library.
#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>
#include <type_traits>

#include "halves.h"
#include "ptx_define.h"

namespace gpu {
namespace {

// A float whose denormals are zeros (`.ftz`).
struct Flushed {
  float number;
  Flushed() = default;
  explicit Flushed(float exact) : number(flush(exact)) {}
  operator float() const { return flush(number); }
  static float flush(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
  }
};

float wide(float x) { return x; }
float wide(Flushed x) { return x; }
double wide(double x) { return x; }
double wide(Half x) { return x; }
double wide(BFloat16 x) { return x; }

// The function in the type that it is computed in. A GPU has one NaN for what it computes.
template <class F, class T, class... Ts>
T map(F function, T first, Ts... others) {
  const auto result = function(wide(first), wide(others)...);
  if constexpr (sizeof(T) == 4) {
    if (std::isnan(result)) return bits<T>(0x7FFFFFFF);
  }
  return T(result);
}

template <class F, class T, class... Ts>
Pair<T> map(F function, Pair<T> first, Ts... others) {
  return {map(function, first.low, others.low...), map(function, first.high, others.high...)};
}

template <class T>
T smaller(T a, T b) {
  if (a == b) return std::signbit(a) ? a : b;
  return std::fmin(a, b);
}

template <class T>
T larger(T a, T b) {
  if (a == b) return std::signbit(a) ? b : a;
  return std::fmax(a, b);
}

template <class T>
T or_nan(T result, T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : result;
}

template <class T>
void define_real(Operations& all, std::string_view type) {
  define(all, "add", type,
         [](T a, T b) { return map([](auto x, auto y) { return x + y; }, a, b); });
  define(all, "sub", type,
         [](T a, T b) { return map([](auto x, auto y) { return x - y; }, a, b); });
  define(all, "mul", type,
         [](T a, T b) { return map([](auto x, auto y) { return x * y; }, a, b); });
  define(all, "div", type,
         [](T a, T b) { return map([](auto x, auto y) { return x / y; }, a, b); });
  define(all, "fma", type, [](T a, T b, T c) {
    return map([](auto x, auto y, auto z) { return std::fma(x, y, z); }, a, b, c);
  });
  define(all, "min", type,
         [](T a, T b) { return map([](auto x, auto y) { return smaller(x, y); }, a, b); });
  define(all, "max", type,
         [](T a, T b) { return map([](auto x, auto y) { return larger(x, y); }, a, b); });
  define(all, "min.NaN", type, [](T a, T b) {
    return map([](auto x, auto y) { return or_nan(smaller(x, y), x, y); }, a, b);
  });
  define(all, "max.NaN", type, [](T a, T b) {
    return map([](auto x, auto y) { return or_nan(larger(x, y), x, y); }, a, b);
  });
  define(all, "abs", type, [](T a) { return map([](auto x) { return std::fabs(x); }, a); });
  define(all, "neg", type, [](T a) { return map([](auto x) { return -x; }, a); });
  define(all, "ex2", type, [](T a) { return map([](auto x) { return std::exp2(x); }, a); });
  define(all, "tanh", type, [](T a) { return map([](auto x) { return std::tanh(x); }, a); });
}

template <class T>
void define_functions(Operations& all, std::string_view type) {
  define(all, "lg2", type, [](T a) { return map([](auto x) { return std::log2(x); }, a); });
  define(all, "rcp", type, [](T a) { return map([](auto x) { return 1 / x; }, a); });
  define(all, "sqrt", type, [](T a) { return map([](auto x) { return std::sqrt(x); }, a); });
  define(all, "rsqrt", type, [](T a) { return map([](auto x) { return 1 / std::sqrt(x); }, a); });
  define(all, "sin", type, [](T a) { return map([](auto x) { return std::sin(x); }, a); });
  define(all, "cos", type, [](T a) { return map([](auto x) { return std::cos(x); }, a); });
  define(all, "copysign", type,
         [](T a, T b) { return map([](auto x, auto y) { return std::copysign(y, x); }, a, b); });
}

// A fused multiply-add rounded in a direction of <cfenv>, which the compiler must not move.
float fma_towards(int direction, float a, float b, float c) {
  volatile float x = a;
  std::fesetround(direction);
  volatile float result = std::fma(x, b, c);
  std::fesetround(FE_TONEAREST);
  return result;
}

// Comparisons that hold for numbers, and their twins that also hold for NaN ("ltu").
template <class T>
void define_real_comparisons(Operations& all, std::string_view type) {
  define(all, "setp.eq", type, [](T a, T b) { return wide(a) == wide(b); });
  define(all, "setp.lt", type, [](T a, T b) { return wide(a) < wide(b); });
  define(all, "setp.le", type, [](T a, T b) { return wide(a) <= wide(b); });
  define(all, "setp.gt", type, [](T a, T b) { return wide(a) > wide(b); });
  define(all, "setp.ge", type, [](T a, T b) { return wide(a) >= wide(b); });
  define(all, "setp.ne", type, [](T a, T b) { return wide(a) < wide(b) || wide(a) > wide(b); });
  define(all, "setp.equ", type, [](T a, T b) { return !(wide(a) < wide(b) || wide(a) > wide(b)); });
  define(all, "setp.neu", type, [](T a, T b) { return wide(a) != wide(b); });
  define(all, "setp.ltu", type, [](T a, T b) { return !(wide(a) >= wide(b)); });
  define(all, "setp.leu", type, [](T a, T b) { return !(wide(a) > wide(b)); });
  define(all, "setp.gtu", type, [](T a, T b) { return !(wide(a) <= wide(b)); });
  define(all, "setp.geu", type, [](T a, T b) { return !(wide(a) < wide(b)); });
  define(all, "setp.nan", type,
         [](T a, T b) { return std::isnan(wide(a)) || std::isnan(wide(b)); });
  define(all, "setp.num", type,
         [](T a, T b) { return !std::isnan(wide(a)) && !std::isnan(wide(b)); });
  define(all, "testp.notanumber", type, [](T a) { return std::isnan(wide(a)); });
  define(all, "testp.infinite", type, [](T a) { return std::isinf(wide(a)); });
  define(all, "testp.finite", type, [](T a) { return bool(std::isfinite(wide(a))); });
}

template <class T>
struct Double;
template <>
struct Double<int16_t> {
  using Type = int32_t;
};
template <>
struct Double<uint16_t> {
  using Type = uint32_t;
};
template <>
struct Double<int32_t> {
  using Type = int64_t;
};
template <>
struct Double<uint32_t> {
  using Type = uint64_t;
};
template <>
struct Double<int64_t> {
  using Type = __int128;
};
template <>
struct Double<uint64_t> {
  using Type = unsigned __int128;
};

// Division by zero gives all ones, as on the devices that we know of.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return T(-1);
  return b == T(-1) && std::is_signed_v<T> ? T(0 - uint64_t(a)) : T(a / b);
}

template <class T>
T high(T a, T b) {
  using Wide = typename Double<T>::Type;
  return T(Wide(a) * Wide(b) >> 8 * sizeof(T));
}

template <class T>
T shifted_right(T a, uint32_t n) {
  constexpr uint32_t width = 8 * sizeof(T);
  if (n >= width) return a < 0 ? T(-1) : T(0);
  return T(a >> n);
}

// The field of `length` bits from `start` on, its sign extended where T has one.
template <class T>
T bit_field(T a, uint32_t start, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  start &= 255;
  length &= 255;
  if (length == 0) return 0;
  const T shifted = shifted_right(a, start);
  if (length >= width || start + length >= width) return shifted;
  using Unsigned = std::make_unsigned_t<T>;
  return shifted_right(T(Unsigned(shifted) << (width - length)), width - length);
}

template <class T>
T with_bit_field(T field, T into, uint32_t start, uint32_t length) {
  constexpr uint32_t width = 8 * sizeof(T);
  start &= 255;
  length &= 255;
  if (length == 0 || start >= width) return into;
  const T mask = T((length >= width ? ~T(0) : (T(1) << length) - 1) << start);
  return T((into & ~mask) | (T(field << start) & mask));
}

template <class T>
void define_integer(Operations& all, std::string_view type) {
  using U = std::make_unsigned_t<T>;
  define(all, "add", type, [](T a, T b) { return U(U(a) + U(b)); });
  define(all, "sub", type, [](T a, T b) { return U(U(a) - U(b)); });
  define(all, "mul.lo", type, [](T a, T b) { return T(uint64_t(a) * uint64_t(b)); });
  define(all, "mul.hi", type, [](T a, T b) { return high(a, b); });
  define(all, "mad.lo", type,
         [](T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); });
  define(all, "mad.hi", type, [](T a, T b, T c) { return T(uint64_t(high(a, b)) + uint64_t(c)); });
  define(all, "div", type, [](T a, T b) { return quotient(a, b); });
  define(all, "rem", type,
         [](T a, T b) { return T(uint64_t(a) - uint64_t(quotient(a, b)) * uint64_t(b)); });
  define(all, "min", type, [](T a, T b) { return std::min(a, b); });
  define(all, "max", type, [](T a, T b) { return std::max(a, b); });
  define(all, "abs", type, [](T a) { return T(a < 0 ? 0 - uint64_t(a) : uint64_t(a)); });
  define(all, "neg", type, [](T a) { return T(0 - uint64_t(a)); });
  define(all, "shr", type, [](T a, uint32_t n) { return shifted_right(a, n); });
  define(all, "setp.eq", type, [](T a, T b) { return a == b; });
  define(all, "setp.ne", type, [](T a, T b) { return a != b; });
  define(all, "setp.lt", type, [](T a, T b) { return a < b; });
  define(all, "setp.lo", type, [](T a, T b) { return a < b; });
  define(all, "setp.le", type, [](T a, T b) { return a <= b; });
  define(all, "setp.ls", type, [](T a, T b) { return a <= b; });
  define(all, "setp.gt", type, [](T a, T b) { return a > b; });
  define(all, "setp.hi", type, [](T a, T b) { return a > b; });
  define(all, "setp.ge", type, [](T a, T b) { return a >= b; });
  define(all, "setp.hs", type, [](T a, T b) { return a >= b; });
  if constexpr (sizeof(T) < 8) {
    using W = typename Double<T>::Type;
    define(all, "mul.wide", type, [](T a, T b) { return W(W(a) * W(b)); });
    define(all, "mad.wide", type,
           [](T a, T b, W c) { return W(uint64_t(W(a) * W(b)) + uint64_t(c)); });
  }
  if constexpr (sizeof(T) > 2) {
    define(all, "bfe", type,
           [](T a, uint32_t start, uint32_t length) { return bit_field(a, start, length); });
  }
}

bool inverted(bool a) { return !a; }

template <class T>
T inverted(T a) {
  return T(~a);
}

template <class T>
void define_bits(Operations& all, std::string_view type) {
  define(all, "mov", type, [](T a) { return a; });
  define(all, "and", type, [](T a, T b) { return T(a & b); });
  define(all, "or", type, [](T a, T b) { return T(a | b); });
  define(all, "xor", type, [](T a, T b) { return T(a ^ b); });
  define(all, "not", type, [](T a) { return inverted(a); });
  if constexpr (!std::is_same_v<T, bool>) {
    define(all, "shl", type, [](T a, uint32_t n) { return n >= 8 * sizeof(T) ? T(0) : T(a << n); });
    define(all, "selp", type, [](T a, T b, bool first) { return first ? a : b; });
  }
  if constexpr (sizeof(T) >= 4) {
    define(all, "popc", type, [](T a) { return uint32_t(std::popcount(a)); });
    define(all, "clz", type, [](T a) { return uint32_t(std::countl_zero(a)); });
    define(all, "brev", type, [](T a) {
      T reversed = 0;
      for (size_t i = 0; i < 8 * sizeof(T); ++i)
        reversed |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
      return reversed;
    });
    define(all, "bfi", type, [](T field, T into, uint32_t start, uint32_t length) {
      return with_bit_field(field, into, start, length);
    });
  }
}

template <class T>
void define_equality(Operations& all, std::string_view type) {
  define(all, "setp.eq", type, [](T a, T b) { return a == b; });
  define(all, "setp.ne", type, [](T a, T b) { return a != b; });
}

// Four bytes out of eight; a selector with the eighth bit takes the sign of its byte.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

uint32_t looked_up(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int row = 0; row < 8; ++row) {
    if (!(table >> row & 1)) continue;
    result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}

void define_words(Operations& all) {
  define(all, "prmt", ".b32", [](uint32_t a, uint32_t b, uint32_t c) { return permuted(a, b, c); });
  define(all, "lop3", ".b32",
         [](uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return looked_up(a, b, c, d); });
  define(all, "shf.l.wrap", ".b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return uint32_t((uint64_t(b) << 32 | a) << (n & 31) >> 32);
  });
  define(all, "shf.r.wrap", ".b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return uint32_t((uint64_t(b) << 32 | a) >> (n & 31));
  });
  define(all, "shf.l.clamp", ".b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return uint32_t((uint64_t(b) << 32 | a) << std::min(n, 32u) >> 32);
  });
  define(all, "shf.r.clamp", ".b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return uint32_t((uint64_t(b) << 32 | a) >> std::min(n, 32u));
  });
  define(all, "bfind", ".u32",
         [](uint32_t a) { return a ? 31 - uint32_t(std::countl_zero(a)) : ~0u; });
  define(all, "bfind.shiftamt", ".u32",
         [](uint32_t a) { return a ? uint32_t(std::countl_zero(a)) : ~0u; });
  define(all, "bmsk.clamp", ".b32",
         [](uint32_t start, uint32_t length) { return with_bit_field(~0u, 0u, start, length); });
}

// ---- conversions ----

template <class T>
concept Integer = std::integral<T>;

template <class To, class From>
To saturated(From number) {
  if (std::isnan(number)) return 0;
  // The limits rounded to a double; beyond them the conversion is not defined in C++.
  const double low = double(std::numeric_limits<To>::min());
  const double high = double(std::numeric_limits<To>::max());
  if (double(number) <= low) return std::numeric_limits<To>::min();
  if (double(number) >= high) return std::numeric_limits<To>::max();
  return To(number);
}

template <class To, class From>
void define_conversion(Operations& all, std::string_view types) {
  if constexpr (Integer<To> && Integer<From>) {
    // Wider registers hold the sign of what was converted.
    using Held = std::conditional_t<std::is_signed_v<To>, int64_t, uint64_t>;
    define(all, "cvt", types, [](From a) { return Held(To(a)); });
  } else if constexpr (Integer<To>) {
    define(all, "cvt.rni", types, [](From a) { return saturated<To>(std::nearbyint(wide(a))); });
    define(all, "cvt.rzi", types, [](From a) { return saturated<To>(std::trunc(wide(a))); });
    define(all, "cvt.rmi", types, [](From a) { return saturated<To>(std::floor(wide(a))); });
    define(all, "cvt.rpi", types, [](From a) { return saturated<To>(std::ceil(wide(a))); });
  } else if constexpr (Integer<From>) {
    define(all, "cvt", types, [](From a) { return To(a); });
  } else {
    define(all, "cvt", types, [](From a) { return To(wide(a)); });
    define(all, "cvt.sat", types,
           [](From a) { return To(std::isnan(wide(a)) ? 0 : std::clamp<double>(wide(a), 0, 1)); });
    if constexpr (std::is_same_v<To, From>) {
      define(all, "cvt.rni", types, [](From a) { return To(std::nearbyint(wide(a))); });
      define(all, "cvt.rzi", types, [](From a) { return To(std::trunc(wide(a))); });
      define(all, "cvt.rmi", types, [](From a) { return To(std::floor(wide(a))); });
      define(all, "cvt.rpi", types, [](From a) { return To(std::ceil(wide(a))); });
    }
  }
}

template <class From, class F>
void for_types(F function) {
  function.template operator()<int8_t, From>(".s8");
  function.template operator()<uint8_t, From>(".u8");
  function.template operator()<int16_t, From>(".s16");
  function.template operator()<uint16_t, From>(".u16");
  function.template operator()<int32_t, From>(".s32");
  function.template operator()<uint32_t, From>(".u32");
  function.template operator()<int64_t, From>(".s64");
  function.template operator()<uint64_t, From>(".u64");
  function.template operator()<float, From>(".f32");
  function.template operator()<double, From>(".f64");
  function.template operator()<Half, From>(".f16");
  function.template operator()<BFloat16, From>(".bf16");
}

}  // namespace

void define_arithmetic(Operations& all) {
  define_real<float>(all, ".f32");
  define_real<Flushed>(all, ".ftz.f32");
  define_real<double>(all, ".f64");
  define_real<Half>(all, ".f16");
  define_real<BFloat16>(all, ".bf16");
  define_real<Pair<Half>>(all, ".f16x2");
  define_real<Pair<BFloat16>>(all, ".bf16x2");
  define_functions<float>(all, ".f32");
  define_functions<Flushed>(all, ".ftz.f32");
  define_functions<double>(all, ".f64");
  define_real_comparisons<float>(all, ".f32");
  define_real_comparisons<Flushed>(all, ".ftz.f32");
  define_real_comparisons<double>(all, ".f64");
  define_real_comparisons<Half>(all, ".f16");
  define_real_comparisons<BFloat16>(all, ".bf16");
  define_integer<int16_t>(all, ".s16");
  define_integer<uint16_t>(all, ".u16");
  define_integer<int32_t>(all, ".s32");
  define_integer<uint32_t>(all, ".u32");
  define_integer<int64_t>(all, ".s64");
  define_integer<uint64_t>(all, ".u64");
  define_bits<bool>(all, ".pred");
  for (const char* type : {".b16", ".u16", ".s16", ".f16", ".bf16"})
    define_bits<uint16_t>(all, type);
  for (const char* type : {".b32", ".u32", ".s32", ".f32"}) define_bits<uint32_t>(all, type);
  for (const char* type : {".b64", ".u64", ".s64", ".f64"}) define_bits<uint64_t>(all, type);
  define_equality<uint16_t>(all, ".b16");
  define_equality<uint32_t>(all, ".b32");
  define_equality<uint64_t>(all, ".b64");
  define(all, "fma.rm", ".f32",
         [](float a, float b, float c) { return fma_towards(FE_DOWNWARD, a, b, c); });
  define(all, "fma.rz", ".f32",
         [](float a, float b, float c) { return fma_towards(FE_TOWARDZERO, a, b, c); });
  define_words(all);
}

void define_conversions(Operations& all) {
  const auto to = [&]<class From>(const std::string& from) {
    for_types<From>([&]<class To, class>(const std::string& type) {
      define_conversion<To, From>(all, type + from);
    });
  };
  for_types<void>(
      [&]<class From, class>(const std::string& from) { to.template operator()<From>(from); });
  define(all, "cvt", ".f16x2.f32",
         [](float high, float low) { return Pair<Half>{Half(low), Half(high)}; });
  define(all, "cvt", ".bf16x2.f32",
         [](float high, float low) { return Pair<BFloat16>{BFloat16(low), BFloat16(high)}; });
  // To nearest, ties away from zero: 10 bits of the significand are left.
  define(all, "cvt.rna", ".tf32.f32",
         [](float a) { return uint32_t((bits<uint32_t>(a) + 0x1000) & 0xFFFFE000); });
}

}  // namespace gpu
