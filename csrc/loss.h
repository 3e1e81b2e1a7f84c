// The losses and their derivatives, one source for every instruction set and for CUDA.
//
// Nothing here calls a library on the hot path, so that a compiler can turn the loops that
// use it into vector code: exp and log are written as polynomials, exact to about one unit in
// the last place of the type. On a GPU float32 takes the hardware's exp and division instead.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GREEDYPRUNE_INLINE __host__ __device__ __forceinline__
#else
#define GREEDYPRUNE_INLINE inline __attribute__((always_inline))
#endif

namespace greedyprune {
namespace GREEDYPRUNE_ISA {  // each instruction set has its own copy: the linker must not mix them

template <class Real>
struct Format;

template <>
struct Format<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest_exponent = -126.0f;
  static constexpr float epsilon = 5.9604645e-8f;  // 2^-24
  static constexpr float tiny = 1.1754944e-38f;    // the smallest normal number
  static constexpr int log_terms = 4, log1p_terms = 8;
};

template <>
struct Format<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest_exponent = -1022.0;
  static constexpr double epsilon = 1.1102230246251565e-16;  // 2^-53
  static constexpr double tiny = 2.2250738585072014e-308;
  static constexpr int log_terms = 11, log1p_terms = 17;
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
GREEDYPRUNE_INLINE float exp2_reduced(float r) {
  float p = 1.32647261e-03f;
  p = p * r + 9.67151299e-03f;
  p = p * r + 5.55073358e-02f;
  p = p * r + 2.40222424e-01f;
  p = p * r + 6.93147004e-01f;
  return p * r + 1.0f;
}

// 2^r for |r| <= 1/2: Taylor to the 13th power, relative error 1e-16.
GREEDYPRUNE_INLINE double exp2_reduced(double r) {
  const double x = r * 0.69314718055994530942;
  double p = 1.0 / 6227020800.0;
  p = p * x + 1.0 / 479001600.0;
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

// exp(x) for x <= 0; what would be subnormal becomes the smallest normal number.
template <class Real>
GREEDYPRUNE_INLINE Real exp_nonpositive(Real x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == sizeof(float)) {  // relative error 2^-22; underflows to zero
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
    return power;
  }
#endif
  using F = Format<Real>;
  using Bits = typename F::Bits;
  const Real y = larger(x * static_cast<Real>(1.44269504088896340736), F::lowest_exponent);
  const Real shifted = y + F::round_magic;  // its low bits are the rounded y
  const Real r = y - (shifted - F::round_magic);
  const Bits power = static_cast<Bits>(
      static_cast<typename F::Bits>(bits_of<Bits>(shifted) - bits_of<Bits>(F::round_magic)) *
      (static_cast<Bits>(1) << F::mantissa));
  return bits_of<Real>(static_cast<Bits>(bits_of<Bits>(exp2_reduced(r)) + power));
}

// a / b for |a| <= b, 1 <= b <= 3.
template <class Real>
GREEDYPRUNE_INLINE Real ratio(Real a, Real b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Real) == sizeof(float)) {  // 2 ulp; no branch for what b never is
    float quotient;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
    return quotient;
  }
#endif
  return a / b;
}

// 2 atanh(s) = log((1 + s) / (1 - s)), by its series.
template <int terms, class Real>
GREEDYPRUNE_INLINE Real twice_atanh(Real s) {
  const Real square = s * s;
  Real p = static_cast<Real>(1.0 / (2 * terms + 1));
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 20
#endif
  for (int n = terms - 1; n >= 0; --n) p = p * square + static_cast<Real>(1.0 / (2 * n + 1));
  return 2 * s * p;
}

// log(1 + e) for 0 <= e <= 1, accurate relative to the result however small e is.
template <class Real>
GREEDYPRUNE_INLINE Real log1p_unit(Real e) {
  return twice_atanh<Format<Real>::log1p_terms>(ratio(e, 2 + e));
}

// log(x) for normal x >= 1: x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
template <class Real>
GREEDYPRUNE_INLINE Real log_above_one(Real x) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  const Bits root_half = bits_of<Bits>(static_cast<Real>(0.70710678118654752440));
  const Bits n = (bits_of<Bits>(x) - root_half) >> F::mantissa;
  const Real reduced = bits_of<Real>(
      static_cast<Bits>(bits_of<Bits>(x) - n * (static_cast<Bits>(1) << F::mantissa)));
  const Real f = reduced - 1;
  return static_cast<Real>(n) * static_cast<Real>(0.69314718055994530942) +
         twice_atanh<F::log_terms>(ratio(f, 2 + f));
}

// Elementwise losses l(x, y) of one output x with target y, and dl/dx.

struct SquaredError {  // the caller subtracts the target from the outputs: y is not used
  template <class Real>
  static GREEDYPRUNE_INLINE Real loss(Real x, Real) {
    return x * x;
  }
  template <class Real>
  static GREEDYPRUNE_INLINE Real derivative(Real x, Real) {
    return 2 * x;
  }
};

struct Logistic {  // log(1 + e^x) - x y, as torch's binary_cross_entropy_with_logits
  template <class Real>
  static GREEDYPRUNE_INLINE Real loss(Real x, Real y) {
    const Real magnitude = larger(x, -x);
    return larger(x, static_cast<Real>(0)) - x * y + log1p_unit(exp_nonpositive(-magnitude));
  }
  template <class Real>
  static GREEDYPRUNE_INLINE Real derivative(Real x, Real y) {
    const Real e = exp_nonpositive(x > 0 ? -x : x);
    return (x > 0 ? 1 / (1 + e) : e / (1 + e)) - y;
  }
};

// Cross-entropy of C logits is  highest + log(sum of exp(x_c - highest)) - x_label; its loop over
// the classes belongs to the kernels, which choose what they keep in registers.
template <class Real>
GREEDYPRUNE_INLINE Real cross_entropy(Real highest, Real sum, Real own) {
  return (highest - own) + log_above_one(sum);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
