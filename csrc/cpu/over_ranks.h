// Sums over the samples where other processes have a part of them: a kernel sums over its own, adds
// those sums up over the processes, and decides from what that gives, the same bits on all.
#pragma once

#include <cmath>
#include <initializer_list>

#include "../kernels.h"
#include "../loss.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

struct Sums {
  double* at;
  int64_t n;
};

// A number for the picks so far.
inline uint32_t after_pick(uint32_t picks, int64_t unit) {
  return picks * 1000003u + static_cast<uint32_t>(unit) + 1u;
}

// All these become sums over the processes, in one exchange.
inline Status add_up(std::initializer_list<Sums> all, uint32_t picks, const Workspace& workspace,
                     const Caller& caller) {
  if (!workspace.exchange) return Status::ok;
  int64_t count = 0;
  for (const Sums& sums : all)
    for (int64_t i = 0; i < sums.n; ++i) workspace.exchange[count++] = sums.at[i];
  if (caller.sum(caller.self, count, picks)) return Status::stopped;
  count = 0;
  for (const Sums& sums : all)
    for (int64_t i = 0; i < sums.n; ++i) sums.at[i] = workspace.exchange[count++];
  return Status::ok;
}

// errors, which say how far rounding can have moved sums, also get what adding those up can do.
inline void widen(double* errors, const double* sums, int64_t n, const Workspace& workspace) {
  if (!workspace.exchange) return;
  const double rounding = static_cast<double>(workspace.ranks) * Number<double>::epsilon;
  for (int64_t i = 0; i < n; ++i) errors[i] += rounding * std::fabs(sums[i]);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
