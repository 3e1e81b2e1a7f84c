// The launchers of the greedy loops for one instruction set; kernels.h says what they take.
#pragma once

#include "../kernels.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

Status greedy_gram(Path& path, const double* gram, const Quadratic& quadratic, const Rule& rule,
                   const Workspace& workspace, const Caller& caller);
Status greedy_columns(Path& path, const ColumnCache& cache, const Quadratic& quadratic,
                      const Rule& rule, const Workspace& workspace, const Caller& caller);
Status greedy_pointwise(Path& path, const Pointwise& pointwise, const Rule& rule,
                        const Workspace& workspace, const Caller& caller);
Status greedy_refit(Path& path, const Refit& refit, const LeastSquares* parts, int64_t count,
                    const Rule& rule, const Workspace& workspace, const Caller& caller);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
