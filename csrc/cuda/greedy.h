// The greedy loop on a GPU for squared error through sums over the samples, for greedy_gram.cu and
// greedy_columns.cu (see cpu/quadratic.h for the formulas and cpu/greedy.h for the rules):
//
//   argmin of (1)  =  argmin_j  G_jj / 2 + c_j - k beta_j,      c += G[:, i_k] after each step (2)
//
// All steps are in one launch of one block: a step is one pass over N numbers, and a barrier
// between blocks would take longer than that. The pass that adds a column to c also finds the gap
// and the next step's lowest score. `Columns` gives rows of G, or null for one that is missing:
// then the launch ends before that pick, and another launch goes on with it.
#pragma once

#include "../rounding.h"
#include "launch.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

constexpr int kGreedyThreads = 512;
constexpr int kAhead = 4;  // units that a thread has in registers at a time

// The numbers from which a unit's score is computed.
struct Unit {
  double gram_diagonal, phi_norm, beta;
};

__device__ __forceinline__ Unit unit_of(const Quadratic& q, int64_t j) {
  return {q.gram_diagonal[j], q.phi_norm[j], q.beta[j]};
}

struct QuadraticScores {
  double rounding;
  double steps;         // k
  double phi_norm_sum;  // sum over the picks of |phi_i|

  __device__ __forceinline__ double score(const Unit& unit, double c) const {
    return 0.5 * unit.gram_diagonal + c - steps * unit.beta;
  }
  __device__ __forceinline__ double error(const Unit& unit) const {
    return quadratic_error(rounding, unit.phi_norm, phi_norm_sum, phi_norm_sum, steps, unit.beta,
                           0);
  }
};

// The lowest score among a thread's candidates, as an interval: it is not above `above` and not
// below `below`, whatever rounding did.
struct LowestScore {
  double above = HUGE_VALF, below = HUGE_VALF;

  __device__ __forceinline__ void include(const QuadraticScores& scores, const Unit& unit,
                                          double c) {
    const double score = scores.score(unit, c), error = scores.error(unit);
    above = fmin(above, score + error);
    below = isfinite(score) && isfinite(error) ? fmin(below, score - error) : -HUGE_VALF;
  }
};

template <class Columns>
__global__ void __launch_bounds__(kGreedyThreads)
    greedy_steps(Progress* progress, Path path, Columns columns, Quadratic q, Rule rule,
                 Workspace workspace, int64_t last) {
  int64_t *available = workspace.available, *picked = workspace.picked;
  const unsigned thread = threadIdx.x;
  const bool drawn = rule.candidates > 0;
  int64_t k = progress->length, distinct = progress->distinct, missing = 0, scored = 0;
  double beta_sum = progress->beta_sum, state_sum = progress->state_sum;
  QuadraticScores scores = {q.rounding, 0, progress->phi_norm_sum};
  bool drew = progress->missing > 0;  // the step's candidates are drawn already
  if (k == 0 && !drew) {
    for (int64_t j = thread; j < q.units; j += blockDim.x) {
      available[j] = j;
      picked[j] = 0;
    }
  }
  const auto left = [&] { return rule.replacement ? q.units : q.units - distinct; };
  const auto more = [&] { return k < rule.steps && distinct < rule.size && left() > 0; };
  const auto may_pick = [&](int64_t j) { return rule.replacement || !picked[j]; };
  LowestScore thread_lowest;
  bool known = false;  // the last step found thread_lowest already
  __syncthreads();

  while (k < last && more()) {
    ++k;
    scores.steps = static_cast<double>(k);
    int64_t n = q.units;
    if (drawn) {
      n = rule.candidates < left() ? rule.candidates : left();
      if (thread == 0 && !drew) draw(available, left(), n, rule.draws + (k - 1) * rule.candidates);
      drew = false;
      __syncthreads();
    }
    const auto candidate = [&](int64_t i) { return drawn ? available[i] : i; };
    if (!known) {
      thread_lowest = LowestScore();
      for (int64_t i = thread; i < n; i += blockDim.x) {
        const int64_t j = candidate(i);
        if (drawn || may_pick(j)) thread_lowest.include(scores, unit_of(q, j), q.state[j]);
      }
    }
    const double lowest = block_min(thread_lowest.above);
    int64_t mine = kNoUnit;
    if (!(thread_lowest.below > lowest)) {
      for (int64_t i = thread; i < n; i += blockDim.x) {
        const int64_t j = candidate(i);
        if (!(drawn || may_pick(j))) continue;
        const Unit u = unit_of(q, j);
        if (is_contender(scores.score(u, q.state[j]), scores.error(u), lowest))
          mine = lesser(mine, j);
      }
    }
    const int64_t unit = block_min(mine);  // rounding cannot tell these apart: the lowest index
    const double* column = columns.column(unit);
    if (!column) {
      --k;
      missing = unit + 1;
      break;
    }

    scored += drawn ? n : left();
    const double shrink = 1 / scores.steps;
    const bool repeated = picked[unit] != 0;
    beta_sum += q.beta[unit];
    state_sum += 2 * q.state[unit] + q.gram_diagonal[unit];
    scores.phi_norm_sum += q.phi_norm[unit];
    scores.steps = static_cast<double>(k + 1);
    __syncthreads();  // all threads have read what is changed now
    if (thread == 0) picked[unit] = 1;
    if (!repeated) ++distinct;
    if (drawn && !rule.replacement) take(available, left() + 1, unit);
    __syncthreads();

    double slope = HUGE_VALF;
    thread_lowest = LowestScore();
    known = !drawn;
    for (int64_t from = thread; from < q.units; from += kAhead * blockDim.x) {
      double c[kAhead];  // all loads come before the first store, because none may overtake it
      Unit units[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t j = from + i * static_cast<int64_t>(blockDim.x);
        if (j >= q.units) break;
        c[i] = q.state[j] + __ldcs(column + j);
        units[i] = unit_of(q, j);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t j = from + i * static_cast<int64_t>(blockDim.x);
        if (j >= q.units) break;
        q.state[j] = c[i];
        if (path.gap) slope = fmin(slope, shrink * c[i] - units[i].beta);
        if (known && may_pick(j)) thread_lowest.include(scores, units[i], c[i]);
      }
    }
    if (path.gap) slope = block_min(slope);
    if (thread == 0) {
      path.order[k - 1] = unit;
      path.losses[k - 1] =
          q.scale * (q.target_norm - 2 * shrink * beta_sum + shrink * shrink * state_sum);
      if (path.gap)
        path.gap[k - 1] = 2 * q.scale * (shrink * shrink * state_sum - shrink * beta_sum - slope);
    }
    __syncthreads();
  }
  if (thread == 0) {
    progress->length = k;
    progress->distinct = distinct;
    progress->missing = missing;
    progress->done = !more();
    progress->scored += scored;
    progress->beta_sum = beta_sum;
    progress->state_sum = state_sum;
    progress->phi_norm_sum = scores.phi_norm_sum;
  }
}

template <class Columns>
Status launch_greedy(Progress* progress, const Path& path, const Columns& columns,
                     const Quadratic& objective, const Rule& rule, const Workspace& workspace,
                     int64_t last, void* stream) {
  Launcher launch(stream);
  const int64_t warps = ceil_div(objective.units, kLanes);
  const int threads =
      static_cast<int>(warps * kLanes < kGreedyThreads ? warps * kLanes : kGreedyThreads);
  launch(greedy_steps<Columns>, 1, threads, progress, path, columns, objective, rule, workspace,
         last);
  return launch.status();
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
