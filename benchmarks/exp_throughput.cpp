// The most float32 exponentials per second that a processor does: the sum of 2^x over data that
// stay in the first-level cache, all threads at once. Compiled and called by limits.py.
#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
constexpr int width = 64;
#elif defined(__AVX__)
constexpr int width = 32;
#else
constexpr int width = 16;
#endif

typedef float Floats __attribute__((vector_size(width)));
typedef uint32_t Bits __attribute__((vector_size(width)));
constexpr int lanes = width / 4;

// 2^r for |r| <= 1/2, relative error 9e-8: fewer terms would not be float32's exponential.
static inline Floats power_of_fraction(Floats r) {
  Floats p = r * 1.32647e-3f + 9.67151e-3f;
  p = p * r + 5.550734e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  return p * r + 1.0f;
}

// The exponent by integer arithmetic: any instruction set.
static inline Floats power_by_bits(Floats x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x + magic;
  const Floats p = power_of_fraction(x - (shifted - magic));
  return (Floats)((Bits)p + ((Bits)shifted << 23));
}

// The exponent by AVX-512's own instructions for it, where there are any.
static inline Floats power_by_scaling(Floats x) {
#ifdef __AVX512F__
  const __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  return (Floats)_mm512_scalef_ps((__m512)power_of_fraction(x - (Floats)whole), whole);
#else
  return power_by_bits(x);
#endif
}

// n is a multiple of 4 * lanes. Four sums, so that no addition waits for the one before.
template <Floats power(Floats)>
static double one_thread(const float* x, int64_t n, int64_t repeats) {
  double total = 0;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    asm volatile("" : : "r"(x) : "memory");  // so that no repeat is taken for the one before
    Floats sums[4] = {};
    for (int64_t i = 0; i < n; i += 4 * lanes)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[j] += power(*(const Floats*)(x + i + j * lanes));
    Floats sum = {};
    for (int j = 0; j < 4; ++j) sum += sums[j];
    for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
  }
  return total;
}

// Every thread sums 2^x[0:n] so many times; returns the sum over all of it. x is aligned to 64.
extern "C" double sum_of_powers(int scaling, const float* x, int64_t n, int64_t repeats,
                                int threads) {
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  total += scaling ? one_thread<power_by_scaling>(x, n, repeats)
                   : one_thread<power_by_bits>(x, n, repeats);
  return total;
}
