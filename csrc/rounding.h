// Bounds on the rounding errors of what the kernels compute, for the CPU and for CUDA.
//
// The scores of candidates come with error bounds. Candidates whose bounds overlap with the lowest
// score's are scored again, more exactly. So a bound that is too small could give a wrong pick, and
// one that is too large only takes time. u is the unit roundoff, Number<Real>::epsilon: 2^-24 or
// 2^-53. A sum of n terms that are rounded r times each is off by at most (n + r) u times the sum
// of the terms' magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1;
// terms in u^2 are covered by the counts below being rounded up).
#pragma once

#include <math.h>

#include "kernels.h"
#include "loss.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

// ---------------------------------------------------------------------------------------------
// Losses of candidates. An output is x = base + h w. On the way into x, base and h, w, shrink and
// their products are rounded, and so is the factor log2(e) where exponentials are taken to base 2:
// |dx| <= u (4 |base| + 8 |h w|), without exponentials u (2 |base| + 5 |h w|). The losses are
// Lipschitz in the outputs, which turns |dx| into a bound on the loss.

constexpr double kOutputRoundings = 8;
// For squared error |d(x^2)| <= 2 |x| |dx|, and by Cauchy and Schwarz the sum over samples and
// outputs is at most 2 sqrt(sum w x^2) sqrt(sum w dx^2). Then dx^2 <= u^2 (2 |base| + 5 |h w|)^2
// <= u^2 29 (base^2 + (h w)^2). 48 is 29 rounded up.
constexpr double kSquareRoundings = 48;
// A loss's own roundings: its weight, and the polynomials of exp and log, good to a few units in
// the last place. Terms that are added up in Real are counted on top of that.
constexpr double kLossRoundings = 32;

struct Rounding {
  double weight_sum;  // sum of the weights (over outputs too, where elementwise)
  double weight_largest;
  double base;  // weighted sum of the largest |base| (squared: of base^2)
};

// A candidate: the sum of its features' squares, and of its weights (times shrink) the largest
// magnitude, their sum, and the sum of their squares.
struct Magnitudes {
  double squares, w_largest, w_sum, w_squares;
};

// The longest sums that a kernel takes in Real: of positive terms of the loss, of exponentials, and
// of samples' losses.
struct SumLengths {
  double terms, exponentials, samples;
};

template <class Real>
GREEDYPRUNE_INLINE double rounding_bound(const Rounding& r, const Target<Real>& target, double loss,
                                         const Magnitudes& unit, const SumLengths& length,
                                         int64_t samples) {
  const double epsilon = static_cast<double>(Number<Real>::epsilon);
  const double largest = r.weight_largest;
  const double underflow = static_cast<double>(Number<Real>::tiny) * 8.0 * r.weight_sum;
  const double sums = (kLossRoundings + length.terms) * fabs(loss);
  switch (target.loss) {
    case Loss::squared_error: {
      const double moved = kSquareRoundings * (r.base + largest * unit.w_squares * unit.squares);
      return target.scale * (underflow + epsilon * (2.0 * sqrt(larger(loss, 0.0) * moved) + sums));
    }
    case Loss::cross_entropy: {  // 2-Lipschitz in the largest change of an output
      // sum of |h| <= sqrt(m sum of h^2)
      const double h = sqrt(unit.squares * static_cast<double>(samples));
      const double outputs = static_cast<double>(target.outputs);
      // Of a sum of exponentials, and of some samples' sum of their logarithms.
      const double terms =
          larger(kLossRoundings, length.exponentials) + length.samples * log(outputs);
      return target.scale * (underflow + epsilon * ((2 * kOutputRoundings + length.samples) *
                                                        (r.base + largest * unit.w_largest * h) +
                                                    terms * r.weight_sum + sums));
    }
    case Loss::logistic: {  // 1-Lipschitz
      const double h = sqrt(unit.squares * static_cast<double>(samples));
      return target.scale *
             (underflow + epsilon * (kOutputRoundings * (r.base + largest * unit.w_sum * h) +
                                     kOutputRoundings * r.weight_sum + sums));
    }
  }
  return static_cast<double>(NAN);
}

// ---------------------------------------------------------------------------------------------
// Slopes <gradient, phi_j> = sum over s of h_s (sum over c of g_cs w_c). By Cauchy and Schwarz the
// sum of the terms' magnitudes is at most |gradient| |phi_j|, which the count is multiplied with.

constexpr int kSlopeRoundings = 8;  // gradient, weight, feature and two products, rounded up
constexpr int kFloat64SlopeRoundings = 16;  // the same, and a sum over at most 8 lanes

// outputs: sums over them are in Real, as are those of `in_real` samples; those of `in_float64`
// such sums are in float64.
template <class Real>
double slope_rounding(int64_t outputs, int64_t in_real, int64_t in_float64) {
  return static_cast<double>(outputs + kSlopeRoundings + in_real) *
             static_cast<double>(Number<Real>::epsilon) +
         static_cast<double>(kFloat64SlopeRoundings + in_float64) * Number<double>::epsilon;
}

// An entry of the loss's gradient in float64, in units of u times its sample's weight: derivatives
// of cross-entropy and logistic are differences of two numbers in [0, 1], each good to a few units
// in the last place. (That of squared error is rounded twice: less than its slope's error.)
constexpr int kGradientRoundings = 16;

// The linear term of a loss, shrink * <linear, z + phi_j> + <linear, bias>: three operations on
// sums.
constexpr int kLinearRoundings = 4;
// These sums in float64 on a GPU, beyond one over the outputs: over the tiles, warps and lanes of a
// piece of the samples, and over at most 64 pieces.
constexpr int kPieceRoundings = 128;

// A float64 total over samples and outputs: the loss, or <gradient, z> beyond its number of terms.
constexpr int kTotalRoundings = 32;

// ---------------------------------------------------------------------------------------------
// Scores G_jj / 2 + c_j - k beta_j of squared error. c is the sum of the columns picked so far.
// Column i is off by at most `rounding` |phi_i| |phi_j|: `uncertain` is the sum of |phi_i| over the
// columns in c with this error, `total` the sum over all picks. Adding up k columns in float64
// rounds k times. k roundings of either sign add up to about sqrt(k) u: 64 allows for some thousand
// steps. Sums over ranks add one rounding each.

constexpr int kScoreRoundings = 64;

GREEDYPRUNE_INLINE double quadratic_error(double rounding, double phi_norm, double uncertain,
                                          double total, double steps, double beta, int64_t ranks) {
  return rounding * phi_norm * uncertain + static_cast<double>(kScoreRoundings + ranks) *
                                               Number<double>::epsilon *
                                               (phi_norm * (phi_norm + total) + steps * fabs(beta));
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
