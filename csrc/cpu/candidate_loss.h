// The candidates' losses, their derivatives, and the loss of given outputs; see candidate_loss.cpp.
#pragma once

#include "../kernels.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

constexpr int kTile = 128;  // samples handled together: their partial results stay in L1

template <class Real>
Status candidate_loss(double* losses, double* errors, const int64_t* units, int64_t n,
                      const Features& features, const Real* outgoing, double shrink,
                      const Real* base, const Target<Real>& target, const Caller& caller);

template <class Real>
Status candidate_slope(double* slopes, double* errors, const int64_t* units, int64_t n,
                       const Features& features, const Real* outgoing, const Real* gradient,
                       int64_t outputs, const Caller& caller);

// *loss = loss(outputs), for outputs (C, m) that are relative to the target like `base` above.
template <class Real>
Status outputs_loss(double* loss, const Real* outputs, const Target<Real>& target, int64_t samples,
                    const Caller& caller);

// The same outputs replaced by the gradient of the loss in them.
template <class Real>
void outputs_gradient(Real* outputs, const Target<Real>& target, int64_t samples,
                      const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
