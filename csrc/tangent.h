// A lower bound on every candidate's loss in the next step, from the loss after the last step.
//
// The losses are convex, so they are nowhere below their tangent at the last step's outputs u. With
// k the next step, z the sum of the phi picked so far, u = b + z / (k - 1) and the candidate's
// outputs x = b + (z + phi_j) / k,
//
//     L(x)  >=  L(u) + <L'(u), x - u>  =  L(u) + (<L'(u), phi_j> - <L'(u), u - b>) / k.
//
// The gap after a step needs all the slopes <L'(u), phi_j> anyway. A candidate whose bound is above
// the loss of another is not scored.
#pragma once

#include <math.h>

#include "kernels.h"
#include "rounding.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

constexpr int64_t kScoredFirst = 512;  // candidates that are scored before any is ruled out

// shrink: 1 / k; slope_error(): bound on the rounding error of shrink * slope. It is computed after
// the rest, because computed before it takes more registers than a GPU has. A bound that is not
// finite rules nothing out.
template <class Error>
GREEDYPRUNE_INLINE double tangent_bound(const Tangent& tangent, double slope, double shrink,
                                        const Error& slope_error) {
  const double bound =
      tangent.loss + shrink * (slope - tangent.along) - slope_error() - tangent.error;
  return isfinite(bound) ? bound : -static_cast<double>(HUGE_VALF);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
