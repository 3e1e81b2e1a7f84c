// Squared error, all greedy steps on a Gram matrix in one launch: see greedy.h.
#include "greedy.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

struct GramColumns {
  const double* gram;  // (N, N), symmetric
  int64_t units;

  __device__ __forceinline__ const double* column(int64_t unit) const {
    return gram + unit * units;
  }
};

}  // namespace
}  // namespace GREEDYPRUNE_ISA

// ---------------------------------------------------------------------------------------------

Status cuda::greedy_gram(Progress* progress, const Path& path, const double* gram,
                         const Quadratic& objective, const Rule& rule, const Workspace& workspace,
                         int64_t last, void* stream) {
  using namespace GREEDYPRUNE_ISA;
  const GramColumns columns = {gram, objective.units};
  return launch_greedy(progress, path, columns, objective, rule, workspace, last, stream);
}

}  // namespace greedyprune
