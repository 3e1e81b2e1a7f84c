// The table of kernels for one instruction set.
#include "candidate_loss.h"
#include "candidate_slope.h"
#include "features.h"
#include "gram_columns.h"
#include "greedy_kernels.h"
#include "swap_gains.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

extern const Kernels kernels = {
    collect_features,       measure_features,        candidate_loss<float>, candidate_loss<double>,
    candidate_slope<float>, candidate_slope<double>, gram_columns,          greedy_gram,
    greedy_columns,         greedy_pointwise,        greedy_refit,          swap_gains,
};

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
