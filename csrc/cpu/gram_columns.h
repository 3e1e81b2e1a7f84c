// Columns of the Gram matrix.
#pragma once

#include "../kernels.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

Status gram_columns(double* columns, const int64_t* units, int64_t n, const Features& features,
                    const double* outgoing, int64_t outputs, const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
