// Collecting and measuring the features.
#pragma once

#include "../kernels.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

constexpr int64_t kTile = 128;  // samples that are summed before the sum is added to the total

Status collect_features(void* data, double* squares, double* largest, const void* hidden, Type type,
                        int64_t units, int64_t n, int64_t stride, int64_t first_sample,
                        const Caller& caller);
Status measure_features(double* squares, double* largest, const Features& features,
                        const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
