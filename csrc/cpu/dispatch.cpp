// Finds out which of the compiled instruction sets this processor runs.
#include <cstring>

#include "../kernels.h"

namespace greedyprune {

const char* const* instruction_sets() {
  static const char* names[4] = {nullptr};
  if (names[0]) return names;
  int n = 0;
#ifdef GREEDYPRUNE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("fma"))
    names[n++] = "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names[n++] = "avx2";
#endif
  names[n++] = "baseline";
  names[n] = nullptr;
  return names;
}

const Kernels* kernels_for(const char* instruction_set) {
  for (const char* const* name = instruction_sets(); *name; ++name) {
    if (std::strcmp(*name, instruction_set)) continue;
#ifdef GREEDYPRUNE_X86
    if (!std::strcmp(*name, "avx512")) return &avx512::kernels;
    if (!std::strcmp(*name, "avx2")) return &avx2::kernels;
#endif
    return &baseline::kernels;
  }
  return nullptr;
}

}  // namespace greedyprune
