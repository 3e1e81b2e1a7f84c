// How far the losses move for the rounding of the outputs: an output is known to at most eight
// epsilon of |base| + |h w| (base, features, weights, shrink and each operation rounded once), and
// the losses are Lipschitz in the outputs. Bounds, not estimates: every step is an inequality.
#pragma once

#include <math.h>

#include "kernels.h"
#include "loss.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

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
  // Adding up positive numbers, weighting, the polynomials' last places.
  const double sums = (32.0 + length.terms) * fabs(loss);
  switch (target.loss) {
    case Loss::squared_error: {  // |d(x^2)| <= 2 |x| |dx|, then Cauchy-Schwarz
      const double moved = 48.0 * (r.base + largest * unit.w_squares * unit.squares);
      return target.scale * (underflow + epsilon * (2.0 * sqrt(larger(loss, 0.0) * moved) + sums));
    }
    case Loss::cross_entropy: {  // 2-Lipschitz in the largest change of an output
      const double h = sqrt(unit.squares * static_cast<double>(samples));
      const double outputs = static_cast<double>(target.outputs);
      // Of a sum of exponentials, and of some samples' sum of their logarithms.
      const double terms = larger(32.0, length.exponentials) + length.samples * log(outputs);
      return target.scale * (underflow + epsilon * ((16.0 + length.samples) *
                                                        (r.base + largest * unit.w_largest * h) +
                                                    terms * r.weight_sum + sums));
    }
    case Loss::logistic: {  // 1-Lipschitz
      const double h = sqrt(unit.squares * static_cast<double>(samples));
      return target.scale * (underflow + epsilon * (8.0 * (r.base + largest * unit.w_sum * h) +
                                                    8.0 * r.weight_sum + sums));
    }
  }
  return static_cast<double>(NAN);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
