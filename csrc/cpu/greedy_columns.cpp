// Squared error, all greedy steps on columns of the Gram matrix, for k small beside N: (2) needs
// only the columns of the units that are picked. When a picked unit's column is missing, the caller
// computes it together with those of the predicted next picks (one matrix product). The columns
// stay in a ring buffer until newer ones replace them. This is exact: the result does not depend on
// which columns are in the buffer.
//
// To predict the next picks, the loop runs on with an approximation of G: the partial Cholesky
// factor F of the columns fetched so far. G = F F^T on these columns, and nearly so elsewhere,
// because the units of a layer resemble one another.
#include "greedy_kernels.h"
#include "parallel.h"
#include "quadratic.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

constexpr int64_t kBlock = 512;  // units whose sums stay in L1
// A column adds to the factor only what exceeds float32's rounding: this share of its squared norm.
constexpr double kLearned = 1e-5;

struct CachedColumns {
  const ColumnCache& cache;
  const Quadratic& q;
  const Rule& rule;
  const Workspace& workspace;
  const Caller& caller;
  int64_t next = 0;    // the slot that the next column goes to
  int64_t wanted = 0;  // cache.wanted[0:wanted] are to be fetched
  int64_t rank = 0;    // columns of the factor

  const double* column(int64_t unit, int64_t k) {
    if (cache.slot_of[unit] < 0) {
      wanted = 0;
      want(unit);
      foresee(unit, k);
      if (!fetch()) return nullptr;
    }
    return cache.columns + cache.slot_of[unit] * q.units;
  }

 private:
  void want(int64_t unit) {
    if (cache.slot_of[unit] >= 0 || wanted == cache.block) return;
    for (int64_t i = 0; i < wanted; ++i)
      if (cache.wanted[i] == unit) return;
    cache.wanted[wanted++] = unit;
  }

  // Adds to `wanted` the units that would be picked after `unit` at step k.
  void foresee(int64_t unit, int64_t k) {
    double* ahead = cache.ahead;
    int64_t* taken = cache.taken;
    for (int64_t j = 0; j < q.units; ++j) {
      ahead[j] = q.state[j];
      taken[j] = !rule.replacement && workspace.picked[j];
    }
    for (int64_t i = 0; i < 6 * cache.block && wanted < cache.block && rank > 0; ++i) {
      add_approximate_column(unit);
      taken[unit] = !rule.replacement;
      unit = lowest(++k);
      if (unit < 0) return;
      want(unit);
    }
    if (wanted == cache.block) return;
    for (int64_t j = 0; j < q.units; ++j)  // then the units with the best predicted scores
      if (cache.slot_of[j] >= 0) taken[j] = 1;
    for (int64_t i = 0; i < wanted; ++i) taken[cache.wanted[i]] = 1;
    while (wanted < cache.block) {
      unit = lowest(k);
      if (unit < 0) return;
      taken[unit] = 1;
      want(unit);
    }
  }

  int64_t lowest(int64_t k) const {
    const double steps = static_cast<double>(k);
    double best = HUGE_VAL;
    int64_t unit = -1;
    for (int64_t j = 0; j < q.units; ++j) {
      const double score = 0.5 * q.gram_diagonal[j] + cache.ahead[j] - steps * q.beta[j];
      if (score < best && !cache.taken[j]) {
        best = score;
        unit = j;
      }
    }
    return unit;
  }

  // ahead += F F[unit]
  void add_approximate_column(int64_t unit) {
    Caller quiet = caller;
    quiet.poll = nullptr;
    parallel_blocks(q.units, kBlock, rank, quiet, [&](int64_t first, int64_t last) {
      float sum[kBlock] = {0};
      for (int64_t r = 0; r < rank; ++r) {
        const float* row = cache.factor + r * q.units;
        const float of_unit = row[unit];
#pragma omp simd
        for (int64_t j = first; j < last; ++j) sum[j - first] += of_unit * row[j];
      }
      for (int64_t j = first; j < last; ++j) cache.ahead[j] += static_cast<double>(sum[j - first]);
    });
  }

  // One more column of the factor: column `unit` less the part that the other columns give.
  void learn(int64_t unit) {
    if (rank == cache.rank) return;
    const double* column = cache.columns + cache.slot_of[unit] * q.units;
    for (int64_t j = 0; j < q.units; ++j) cache.ahead[j] = -column[j];
    add_approximate_column(unit);
    const double left = -cache.ahead[unit];
    if (!(left > kLearned * q.gram_diagonal[unit])) return;
    const double scale = -1 / std::sqrt(left);
    for (int64_t j = 0; j < q.units; ++j)
      cache.factor[rank * q.units + j] = static_cast<float>(scale * cache.ahead[j]);
    ++rank;
  }

  bool fetch() {
    if (next + wanted > cache.capacity) next = 0;
    for (int64_t i = 0; i < wanted; ++i) {  // the oldest columns are replaced
      const int64_t replaced = cache.unit_in[next + i];
      if (replaced >= 0) cache.slot_of[replaced] = -1;
      cache.unit_in[next + i] = -1;
    }
    if (caller.fetch(caller.self, next, wanted)) return false;
    for (int64_t i = 0; i < wanted; ++i) {
      cache.slot_of[cache.wanted[i]] = next + i;
      cache.unit_in[next + i] = cache.wanted[i];
    }
    next += wanted;
    for (int64_t i = 0; i < wanted; ++i) learn(cache.wanted[i]);
    return true;
  }
};

}  // namespace

// ---------------------------------------------------------------------------------------------

Status greedy_columns(Path& path, const ColumnCache& cache, const Quadratic& quadratic,
                      const Rule& rule, const Workspace& workspace, const Caller& caller) {
  CachedColumns columns{cache, quadratic, rule, workspace, caller};
  QuadraticObjective<CachedColumns> objective(quadratic, columns, workspace, caller);
  return greedy(path, objective, quadratic.units, rule, workspace, caller);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
