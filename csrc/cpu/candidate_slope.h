// The candidates' derivatives.
#pragma once

#include "../kernels.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

template <class Real>
Status candidate_slope(double* slopes, double* errors, const int64_t* units, int64_t n,
                       const Features& features, const Real* outgoing, const Real* gradient,
                       int64_t outputs, const Caller& caller);

// Replaces outputs (C, m), relative to the target as in candidate_loss, by the gradient of the loss
// in these outputs.
template <class Real>
void outputs_gradient(Real* outputs, const Target<Real>& target, int64_t samples,
                      const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
