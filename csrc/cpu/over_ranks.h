// Sums over samples that are spread over processes. A kernel sums over its own samples, adds these
// sums up over the processes, and decides from the totals, which have the same bits on all of them.
#pragma once

#include <cmath>
#include <initializer_list>

#include "../kernels.h"
#include "../loss.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

struct PartialSums {
  double* values;
  int64_t n;
};

// Mixes a pick into the number that stands for all picks so far. (The multiplier could be any odd
// number that spreads the bits. This one is from Python's old hash of tuples.)
inline uint32_t after_pick(uint32_t picks, int64_t unit) {
  return picks * 1000003u + static_cast<uint32_t>(unit) + 1u;
}

// Adds up all these sums over the processes, in one exchange.
inline Status add_up(std::initializer_list<PartialSums> all, uint32_t picks,
                     const Workspace& workspace, const Caller& caller) {
  if (!workspace.exchange) return Status::ok;
  int64_t count = 0;
  for (const PartialSums& sums : all)
    for (int64_t i = 0; i < sums.n; ++i) workspace.exchange[count++] = sums.values[i];
  if (caller.sum(caller.self, count, picks)) return Status::stopped;
  count = 0;
  for (const PartialSums& sums : all)
    for (int64_t i = 0; i < sums.n; ++i) sums.values[i] = workspace.exchange[count++];
  return Status::ok;
}

// Adds to the errors of sums the rounding error of adding these up over the processes.
inline void widen(double* errors, const double* sums, int64_t n, const Workspace& workspace) {
  if (!workspace.exchange) return;
  const double rounding = static_cast<double>(workspace.ranks) * Number<double>::epsilon;
  for (int64_t i = 0; i < n; ++i) errors[i] += rounding * std::fabs(sums[i]);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
