// Shares units or samples out to threads, and asks the caller every 50 ms whether to go on.
#pragma once

#include "../kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

// Calls body(first, last) for blocks of [0, n). One thread computes a block in a fixed order, so
// the results do not depend on which thread takes which. Returns false if the caller stopped it.
// `work` is about the number of multiply-adds for each of the n.
template <class Body>
bool parallel_blocks(int64_t n, int64_t block, int64_t work, const Caller& caller,
                     const Body& body) {
  const int64_t blocks = (n + block - 1) / block;
  int stopped = 0;
#ifdef _OPENMP
  // Waking a thread takes some microseconds, and more where others use the cores. So each thread
  // gets at least this much work.
  constexpr int64_t kWorth = 1 << 17;
  int64_t threads = blocks < caller.threads ? blocks : caller.threads;
  if (threads > 1 + n * work / kWorth) threads = 1 + n * work / kWorth;
  const double start = omp_get_wtime();
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads)) if (threads > 1)
#endif
  for (int64_t i = 0; i < blocks; ++i) {
    int skip;
#ifdef _OPENMP
#pragma omp atomic read
#endif
    skip = stopped;
    if (skip) continue;
    body(i * block, (i + 1) * block < n ? (i + 1) * block : n);
#ifdef _OPENMP
    if (caller.poll && omp_get_thread_num() == 0) {
      static thread_local double asked = 0;
      const double now = omp_get_wtime();
      if (now - start > 0.05 && now - asked > 0.05) {
        asked = now;
        if (caller.poll(caller.self)) {
#pragma omp atomic write
          stopped = 1;
        }
      }
    }
#endif
  }
#ifndef _OPENMP
  if (caller.poll) stopped = caller.poll(caller.self);
#endif
  return !stopped;
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
