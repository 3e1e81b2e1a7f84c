// The gains of exchanging kept units for dropped ones.
#pragma once

#include "../kernels.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

Status swap_gains(double* gains, const Swaps& problem, const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
