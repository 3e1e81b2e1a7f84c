// Squared error, all greedy steps on a Gram matrix: O(N) a step. See quadratic.h for the formulas.
#include "greedy_kernels.h"
#include "quadratic.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

struct GramColumns {
  const double* gram;  // (N, N), symmetric
  int64_t units;

  const double* column(int64_t unit, int64_t) const { return gram + unit * units; }
};

}  // namespace

// ---------------------------------------------------------------------------------------------

Status greedy_gram(Path& path, const double* gram, const Quadratic& quadratic, const Rule& rule,
                   const Workspace& workspace, const Caller& caller) {
  GramColumns columns{gram, quadratic.units};
  QuadraticObjective<GramColumns> objective(quadratic, columns, workspace, caller);
  return greedy(path, objective, quadratic.units, rule, workspace, caller);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
