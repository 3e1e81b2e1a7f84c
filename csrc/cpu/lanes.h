// Vectors of as many numbers as a register holds, by an extension of C++ that GCC and Clang share:
// operators work lane by lane, and the compiler emulates those that an instruction set lacks.
#pragma once

#include <cstdint>

#include "../loss.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Real>
struct Lanes;  // Wide: as many numbers, in float64

template <>
struct Lanes<float> {
  static constexpr int count = kVectorBytes / 4;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef double Wide __attribute__((vector_size(kVectorBytes * 2)));
};

template <>
struct Lanes<double> {
  static constexpr int count = kVectorBytes / 8;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef double Wide __attribute__((vector_size(kVectorBytes)));
  typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
};

template <>
struct Number<Lanes<float>::Vector> : Single {
  using Real = float;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  static GREEDYPRUNE_INLINE Lanes<float>::Vector real(Bits n) {
    return __builtin_convertvector(n, Lanes<float>::Vector);
  }
};

template <>
struct Number<Lanes<double>::Vector> : Double {
  using Real = double;
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Unsigned __attribute__((vector_size(kVectorBytes)));
  static GREEDYPRUNE_INLINE Lanes<double>::Vector real(Bits n) {
    return __builtin_convertvector(n, Lanes<double>::Vector);
  }
};

// Loads from memory of any alignment, and converts the type.
GREEDYPRUNE_INLINE void load(Lanes<float>::Vector* v, const float* from) {
  memcpy(v, from, sizeof *v);
}
GREEDYPRUNE_INLINE void load(Lanes<float>::Vector* v, const double* from) {
  Lanes<float>::Wide wide;
  memcpy(&wide, from, sizeof wide);
  *v = __builtin_convertvector(wide, Lanes<float>::Vector);
}
GREEDYPRUNE_INLINE void load(Lanes<double>::Vector* v, const double* from) {
  memcpy(v, from, sizeof *v);
}
GREEDYPRUNE_INLINE void load(Lanes<double>::Vector* v, const float* from) {
  Lanes<double>::Narrow narrow;
  memcpy(&narrow, from, sizeof narrow);
  *v = __builtin_convertvector(narrow, Lanes<double>::Vector);
}

// Loads all lanes, or (not kWhole) n of them and zeros.
template <class Vector, bool kWhole, class From>
GREEDYPRUNE_INLINE Vector load_lanes(const From* from, int64_t n) {
  Vector v = {};
  if (kWhole)
    load(&v, from);
  else
    for (int64_t i = 0; i < n; ++i) v[i] = static_cast<typename Number<Vector>::Real>(from[i]);
  return v;
}

// n ones, then zeros.
template <class Vector>
GREEDYPRUNE_INLINE Vector ones(int64_t n) {
  Vector v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = 1;
  return v;
}

// The larger of x >= 0 and |y|.
template <class Vector>
GREEDYPRUNE_INLINE Vector farther(Vector x, Vector y) {
  using Unsigned = typename Number<Vector>::Unsigned;
  const Unsigned a = bits_of<Unsigned>(x), b = (bits_of<Unsigned>(y) << 1) >> 1;
  return bits_of<Vector>(a > b ? a : b);
}

// The sum of the lanes in float64, in a fixed order.
template <class Vector>
GREEDYPRUNE_INLINE double sum_of(const Vector& v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof v / sizeof v[0]; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
