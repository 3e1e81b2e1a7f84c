// How far the losses move for the rounding of the outputs: an output is known to at most eight
// epsilon of |base| + |h w| (base, features, weights, shrink and each operation rounded once), and
// the losses are Lipschitz in the outputs. Bounds, not estimates: every step is an inequality.
#pragma once

#include <cmath>

#include "../kernels.h"
#include "../loss.h"
#include "candidate_loss.h"
#include "lanes.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

struct Rounding {
  double weight_sum;  // sum of the weights (over outputs too, where elementwise)
  double weight_largest;
  double base;  // weighted sum of the largest |base| (squared: of base^2)
};

template <class Real>
Rounding rounding_of(const Real* base, const Target<Real>& target, int64_t samples) {
  Rounding r{0, 0, 0};
  const bool per_sample = target.loss == Loss::cross_entropy;
  const auto add = [&](const double* size, int64_t at, int64_t n) {  // magnitudes, or their squares
    for (int64_t i = 0; i < n; ++i) {
      const double weight = target.weight ? static_cast<double>(target.weight[at + i]) : 1.0;
      r.weight_sum += weight;
      r.weight_largest = larger(r.weight_largest, weight);
      r.base += weight * size[i];
    }
  };
  for (int64_t s = 0; s < samples; s += kTile) {
    const int64_t n = s + kTile < samples ? kTile : samples - s;
    double size[kTile] = {0};
    for (int64_t c = 0; c < target.outputs; ++c) {
      const Real* x = base + c * samples + s;
      for (int64_t i = 0; i < n; ++i) {
        const double magnitude = std::fabs(static_cast<double>(x[i]));
        if (per_sample)
          size[i] = larger(size[i], magnitude);
        else
          size[i] = target.loss == Loss::squared_error ? magnitude * magnitude : magnitude;
      }
      if (!per_sample) add(size, c * samples + s, n);
    }
    if (per_sample) add(size, s, n);
  }
  return r;
}

template <class Real>
double rounding_bound(const Rounding& r, const Target<Real>& target, double loss, double squares,
                      const Real* outgoing, double shrink, int64_t samples) {
  double w_largest = 0, w_sum = 0, w_squares = 0;
  for (int64_t c = 0; c < target.outputs; ++c) {
    const double w = std::fabs(shrink * static_cast<double>(outgoing[c]));
    w_largest = larger(w_largest, w);
    w_sum += w;
    w_squares += w * w;
  }
  const double epsilon = static_cast<double>(Number<Real>::epsilon);
  const double largest = r.weight_largest;
  const double underflow = static_cast<double>(Number<Real>::tiny) * 8.0 * r.weight_sum;
  // Adding up positive numbers, weighting, the polynomials' last places.
  const double sums = (32.0 + 2.0 * kTerms) * loss;
  const double lane = static_cast<double>(kTile / Lanes<Real>::count);  // samples in a Real sum
  switch (target.loss) {
    case Loss::squared_error: {  // |d(x^2)| <= 2 |x| |dx|, then Cauchy-Schwarz
      const double moved = 48.0 * (r.base + largest * w_squares * squares);
      return target.scale *
             (underflow + epsilon * (2.0 * std::sqrt(larger(loss, 0.0) * moved) + sums));
    }
    case Loss::cross_entropy: {  // 2-Lipschitz in the largest change of an output
      const double h = std::sqrt(squares * static_cast<double>(samples));
      const double outputs = static_cast<double>(target.outputs);
      // Of a sum of exponentials, and of a lane's sum of their logarithms.
      const double terms = larger(32.0, kTerms + outputs / kTerms) + lane * std::log(outputs);
      return target.scale *
             (underflow + epsilon * ((16.0 + lane) * (r.base + largest * w_largest * h) +
                                     terms * r.weight_sum + sums));
    }
    case Loss::logistic: {  // 1-Lipschitz
      const double h = std::sqrt(squares * static_cast<double>(samples));
      return target.scale * (underflow + epsilon * (8.0 * (r.base + largest * w_sum * h) +
                                                    8.0 * r.weight_sum + sums));
    }
  }
  return NAN;
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
