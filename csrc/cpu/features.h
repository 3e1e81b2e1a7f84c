// Collecting and measuring the features.
#pragma once

#include "../kernels.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

constexpr int64_t kTile = 128;  // samples whose sums are added up before they join the others

Status collect_features(const Features& features, double* squares, double* largest,
                        const void* hidden, int64_t n, int64_t at, const Caller& caller);
Status measure_features(double* squares, double* largest, const Features& features,
                        const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
