// The rounding bound of a candidate's loss (../rounding.h) for the kernels of candidate_loss.cpp.
#pragma once

#include <cmath>

#include "../kernels.h"
#include "../loss.h"
#include "../rounding.h"
#include "candidate_loss.h"
#include "lanes.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

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
  Magnitudes unit = {squares, 0, 0, 0};
  for (int64_t c = 0; c < target.outputs; ++c) {
    const double w = std::fabs(shrink * static_cast<double>(outgoing[c]));
    unit.w_largest = larger(unit.w_largest, w);
    unit.w_sum += w;
    unit.w_squares += w * w;
  }
  const double in_lane = static_cast<double>(kTile / Lanes<Real>::count);  // samples in a Real sum
  const double exponentials = kTerms + static_cast<double>(target.outputs) / kTerms;
  return rounding_bound(r, target, loss, unit, {2.0 * kTerms, exponentials, in_lane}, samples);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
