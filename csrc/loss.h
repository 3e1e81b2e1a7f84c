// The losses and their derivatives, one source for every instruction set and for CUDA.
//
// Nothing here calls a library on the hot path, so that a compiler can turn the loops that use it
// into vector code. exp and log are polynomials, good to about one unit in the last place of the
// type. On a GPU, float32 takes the hardware's exp and division instead.
#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {  // each instruction set has its own copy: the linker must not mix them

// The constants of a floating type. cpu/lanes.h adds the types of vectors.
template <class V>
struct Number;

struct Single {
  static constexpr int mantissa = 23;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest_exponent = -126.0f;
  static constexpr float epsilon = 5.9604645e-8f;  // 2^-24
  static constexpr float tiny = 1.1754944e-38f;    // the smallest normal number
  static constexpr int log_terms = 4, log1p_terms = 8;
};

struct Double {
  static constexpr int mantissa = 52;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest_exponent = -1022.0;
  static constexpr double epsilon = 1.1102230246251565e-16;  // 2^-53
  static constexpr double tiny = 2.2250738585072014e-308;
  static constexpr int log_terms = 11, log1p_terms = 17;
};

template <>
struct Number<float> : Single {
  using Real = float;
  using Bits = int32_t;
  using Unsigned = uint32_t;
  static GREEDYPRUNE_INLINE float real(int32_t n) { return static_cast<float>(n); }
};

template <>
struct Number<double> : Double {
  using Real = double;
  using Bits = int64_t;
  using Unsigned = uint64_t;
  static GREEDYPRUNE_INLINE double real(int64_t n) { return static_cast<double>(n); }
};

template <class To, class From>
GREEDYPRUNE_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Real>
GREEDYPRUNE_INLINE Real larger(Real a, Real b) {
#ifdef __CUDA_ARCH__
  return fmax(a, b);  // one instruction; the other form lets a NaN in b through, and takes two
#else
  return a > b ? a : b;
#endif
}

// 2^r for |r| <= 1/2: minimax polynomial with p(0) = 1, relative error 9e-8.
template <class V>
GREEDYPRUNE_INLINE V exp2_reduced(V r, float) {
  V p = r * 1.32647261e-03f + 9.67151299e-03f;
  p = p * r + 5.55073358e-02f;
  p = p * r + 2.40222424e-01f;
  p = p * r + 6.93147004e-01f;
  return p * r + 1.0f;
}

// 2^r for |r| <= 1/2: Taylor to the 13th power, relative error 1e-16.
template <class V>
GREEDYPRUNE_INLINE V exp2_reduced(V r, double) {
  const V x = r * 0.69314718055994530942;
  V p = x * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * x + 1.0 / 39916800.0;
  p = p * x + 1.0 / 3628800.0;
  p = p * x + 1.0 / 362880.0;
  p = p * x + 1.0 / 40320.0;
  p = p * x + 1.0 / 5040.0;
  p = p * x + 1.0 / 720.0;
  p = p * x + 1.0 / 120.0;
  p = p * x + 1.0 / 24.0;
  p = p * x + 1.0 / 6.0;
  p = p * x + 0.5;
  p = p * x + 1.0;
  return p * x + 1.0;
}

// Cross-entropy subtracts each sample's highest output from all of them, so that no exponential
// overflows. Where no candidate moves an output further than 2^reach, the highest output of base is
// subtracted instead, once for all candidates, and base is cut off at 2^floor. Then
//   no exponential is subnormal:       floor - reach is above the lowest exponent;
//   no product of two sums overflows:  each is at most C 2^reach;
//   what is cut off is below rounding: at most 2^(floor + reach), beside a sum of at least
//   2^-reach.
template <class Real>
struct ExponentRange;
template <>
struct ExponentRange<float> {
  static constexpr float reach = 28, floor = -97;
};
template <>
struct ExponentRange<double> {
  static constexpr double reach = 100, floor = -900;
};

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

// 2^y for y between the lowest exponent and the highest.
template <class V>
GREEDYPRUNE_INLINE V exp2_normal(V y) {
  using F = Number<V>;
  using Unsigned = typename F::Unsigned;
  const V shifted = y + F::round_magic;  // its low bits are the rounded y
  const V power = exp2_reduced(y - (shifted - F::round_magic), typename F::Real());
  return bits_of<V>(bits_of<Unsigned>(power) + (bits_of<Unsigned>(shifted) << F::mantissa));
}

// The larger of y and `lowest` < 0. Of two negative numbers the larger one has the smaller bits, so
// integers are compared: every instruction set can, and no NaN complicates it.
template <class V>
GREEDYPRUNE_INLINE V at_least(V y, typename Number<V>::Real lowest) {
  using Unsigned = typename Number<V>::Unsigned;
  using Word = typename Number<typename Number<V>::Real>::Unsigned;
  const Unsigned bits = bits_of<Unsigned>(y), limit = Unsigned{} + bits_of<Word>(lowest);
  return bits_of<V>(bits < limit ? bits : limit);
}

// 2^y for y up to the highest exponent. A subnormal result becomes the smallest normal number.
template <class V>
GREEDYPRUNE_INLINE V exp2_upto(V y) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == sizeof(float)) {  // relative error 2^-22; underflows to zero
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
    return power;
  }
#endif
  return exp2_normal(at_least(y, Number<V>::lowest_exponent));
}

// exp(x) for x <= 0, with subnormal results as above.
template <class V>
GREEDYPRUNE_INLINE V exp_nonpositive(V x) {
  return exp2_upto(x * static_cast<typename Number<V>::Real>(kLog2E));
}

// a / b for |a| <= b, 1 <= b <= 3.
template <class V>
GREEDYPRUNE_INLINE V ratio(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(V) == sizeof(float)) {  // 2 ulp; no branch for values that b never has
    float quotient;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
    return quotient;
  }
#endif
  return a / b;
}

// 2 atanh(s) = log((1 + s) / (1 - s)), by its series.
template <int terms, class V>
GREEDYPRUNE_INLINE V twice_atanh(V s) {
  using Real = typename Number<V>::Real;
  const V square = s * s;
  V p = V{} + static_cast<Real>(1.0 / (2 * terms + 1));
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 20
#endif
  for (int n = terms - 1; n >= 0; --n) p = p * square + static_cast<Real>(1.0 / (2 * n + 1));
  return (s + s) * p;
}

// log(1 + e) for 0 <= e <= 1, accurate relative to the result however small e is.
template <class V>
GREEDYPRUNE_INLINE V log1p_unit(V e) {
  return twice_atanh<Number<V>::log1p_terms>(
      ratio(e, e + static_cast<typename Number<V>::Real>(2)));
}

// x = 2^n f with f in [sqrt(1/2), sqrt(2)), for normal x > 0: f, and n through the pointer.
template <class V>
GREEDYPRUNE_INLINE V split_exponent(V x, typename Number<V>::Bits* n) {
  using F = Number<V>;
  using Bits = typename F::Bits;
  using Word = typename Number<typename F::Real>::Bits;
  const Word root_half = bits_of<Word>(static_cast<typename F::Real>(0.70710678118654752440));
  *n = (bits_of<Bits>(x) - root_half) >> F::mantissa;
  return bits_of<V>(static_cast<Bits>(bits_of<Bits>(x) - *n * (Word{1} << F::mantissa)));
}

// log(x) for normal x > 0, exact to some units in the last place of max(1, |log x|).
template <class V>
GREEDYPRUNE_INLINE V log_normal(V x) {
  using F = Number<V>;
  typename F::Bits n;
  using Real = typename F::Real;
  const V f = split_exponent(x, &n) - static_cast<Real>(1);
  return F::real(n) * static_cast<Real>(kLn2) +
         twice_atanh<F::log_terms>(ratio(f, f + static_cast<Real>(2)));
}

// The larger of x and 0; as bits, like at_least.
template <class V>
GREEDYPRUNE_INLINE V positive_part(V x) {
  using Bits = typename Number<V>::Bits;
  const Bits bits = bits_of<Bits>(x);
  return bits_of<V>(bits > Bits{} ? bits : Bits{});
}

// -|x|
template <class V>
GREEDYPRUNE_INLINE V minus_magnitude(V x) {
  using Unsigned = typename Number<V>::Unsigned;
  using Word = typename Number<typename Number<V>::Real>::Unsigned;
  constexpr Word sign = Word{1} << (8 * sizeof(Word) - 1);
  return bits_of<V>(bits_of<Unsigned>(x) | sign);
}

// Elementwise losses l(x, y) of one output x with target y, and dl/dx.

struct SquaredError {  // the caller subtracts the target from the outputs, and y is not used
  template <class V>
  static GREEDYPRUNE_INLINE V loss(V x, V) {
    return x * x;
  }
  template <class Real>
  static GREEDYPRUNE_INLINE Real derivative(Real x, Real) {
    return x + x;
  }
};

struct Logistic {  // log(1 + e^x) - x y, as torch's binary_cross_entropy_with_logits
  template <class V>
  static GREEDYPRUNE_INLINE V loss(V x, V y) {
    return positive_part(x) - x * y + log1p_unit(exp_nonpositive(minus_magnitude(x)));
  }
  template <class Real>
  static GREEDYPRUNE_INLINE Real derivative(Real x, Real y) {
    const Real e = exp_nonpositive(x > 0 ? -x : x);
    return (x > 0 ? 1 / (1 + e) : e / (1 + e)) - y;
  }
};

// Cross-entropy of C logits is  highest + log(sum of exp(x_c - highest)) - x_label. The kernels
// loop over the classes themselves, because they choose what they keep in registers.
template <class Real>
GREEDYPRUNE_INLINE Real cross_entropy(Real highest, Real sum, Real of_label) {
  return (highest - of_label) + log_normal(sum);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
