// Squared error, all greedy steps on columns of the Gram matrix, for k small beside N: (2) needs
// only the columns of the units that get picked. When a picked unit's column is missing, the caller
// computes it together with those of the units that scored best at that moment (one matrix
// product), and they stay in a ring. Exact: which columns are at hand changes no number.
#include "greedy_kernels.h"
#include "quadratic.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

struct CachedColumns {
  const ColumnCache& cache;
  int64_t units;
  const Caller& caller;
  int64_t next = 0;    // the slot that the next column goes to
  int64_t wanted = 0;  // cache.wanted[0:wanted] are the best missing units, best first

  // Note the best-scoring units whose columns are missing, up to a block of them.
  Status remember(const int64_t* scored, const double* scores, int64_t n) {
    wanted = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (cache.slot_of[scored[i]] >= 0) continue;
      if (wanted == cache.block && !(scores[i] < cache.best[wanted - 1])) continue;
      int64_t at = wanted < cache.block ? wanted++ : wanted - 1;
      for (; at > 0 && scores[i] < cache.best[at - 1]; --at) {
        cache.wanted[at] = cache.wanted[at - 1];
        cache.best[at] = cache.best[at - 1];
      }
      cache.wanted[at] = scored[i];
      cache.best[at] = scores[i];
    }
    return Status::ok;
  }

  const double* column(int64_t unit) {
    if (cache.slot_of[unit] < 0 && !fetch(unit)) return nullptr;
    return cache.columns + cache.slot_of[unit] * units;
  }

  bool fetch(int64_t unit) {
    int64_t count = wanted, at = 0;
    while (at < count && cache.wanted[at] != unit) ++at;
    if (at == count) {  // the pick comes with the others, whatever its rough score was
      if (count < cache.block) ++count;
      cache.wanted[count - 1] = unit;
    }
    if (next + count > cache.capacity) next = 0;
    for (int64_t i = 0; i < count; ++i) {  // the oldest columns make room
      const int64_t old = cache.unit_in[next + i];
      if (old >= 0) cache.slot_of[old] = -1;
      cache.unit_in[next + i] = -1;
    }
    if (caller.fetch(caller.self, next, count)) return false;
    for (int64_t i = 0; i < count; ++i) {
      cache.slot_of[cache.wanted[i]] = next + i;
      cache.unit_in[next + i] = cache.wanted[i];
    }
    next += count;
    return true;
  }
};

}  // namespace

// ---------------------------------------------------------------------------------------------

Status greedy_columns(Path& path, const ColumnCache& cache, const Quadratic& quadratic,
                      const Rule& rule, const Workspace& workspace, const Caller& caller) {
  CachedColumns columns{cache, quadratic.units, caller};
  QuadraticObjective<CachedColumns> objective(quadratic, columns, workspace, caller);
  return greedy(path, objective, quadratic.units, rule, workspace, caller);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
