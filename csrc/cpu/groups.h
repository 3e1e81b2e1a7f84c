// Candidates are scored in groups: the numbers loaded at a sample serve the whole group.
#pragma once

#include "lanes.h"
#include "parallel.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

constexpr int kGroup =
    kVectorBytes == 64 ? 8 : 4;  // candidates at a time: as many as registers hold

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls score(Count, first) for every whole group of the n candidates, and for each of the rest
// alone. Returns false if the caller stopped it.
template <class Score>
bool in_groups(int64_t n, int64_t work, const Caller& caller, const Score& score) {
  return parallel_blocks(n, kGroup, work, caller, [&](int64_t first, int64_t last) {
    if (last - first == kGroup) return score(Count<kGroup>(), first);
    for (int64_t i = first; i < last; ++i) score(Count<1>(), i);
  });
}

// Points the group at its candidates' features and weights.
template <int kCount, class Feature, class Real>
void point_at(const Feature** group_features, const Real** group_outgoing, const int64_t* units,
              const Features& features, const Real* outgoing, int64_t outputs) {
  for (int u = 0; u < kCount; ++u) {
    group_features[u] = static_cast<const Feature*>(features.data) + units[u] * features.stride;
    group_outgoing[u] = outgoing + units[u] * outputs;
  }
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
