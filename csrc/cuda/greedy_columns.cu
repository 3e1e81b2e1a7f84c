// Squared error, greedy steps on columns of the Gram matrix until one is missing: see greedy.h. The
// caller then computes it together with others in one matrix product, and calls again: one
// synchronisation for a block of columns. Which columns are fetched together changes no number.
#include "greedy.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

struct CachedColumns {
  const double* columns;   // (capacity, N)
  const int64_t* slot_of;  // (N)
  int64_t units;

  __device__ __forceinline__ const double* column(int64_t unit) const {
    const int64_t slot = slot_of[unit];
    return slot < 0 ? nullptr : columns + slot * units;
  }
};

}  // namespace
}  // namespace GREEDYPRUNE_ISA

// ---------------------------------------------------------------------------------------------

Status cuda::greedy_columns(Progress* progress, const Path& path, const double* columns,
                            const int64_t* slot_of, const Quadratic& objective, const Rule& rule,
                            const Workspace& workspace, int64_t last, void* stream) {
  using namespace GREEDYPRUNE_ISA;
  const CachedColumns cached = {columns, slot_of, objective.units};
  return launch_greedy(progress, path, cached, objective, rule, workspace, last, stream);
}

}  // namespace greedyprune
