// The candidates' losses and the loss of given outputs.
#pragma once

#include "../kernels.h"
#include "features.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

constexpr int64_t kTerms = 60;  // outputs that are summed in Real at a time

template <class Real>
Status candidate_loss(double* losses, double* errors, const int64_t* units, int64_t n,
                      const Features& features, const Real* outgoing, double shrink,
                      const Real* base, const Target<Real>& target, const Caller& caller);

// *loss = loss(outputs) for outputs (C, m) that are relative to the target, as `base` is above.
template <class Real>
Status outputs_loss(double* loss, const Real* outputs, const Target<Real>& target, int64_t samples,
                    const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
