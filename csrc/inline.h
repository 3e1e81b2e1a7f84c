// Marks functions that kernels of both devices inline.
#pragma once

#ifdef __CUDACC__
#define GREEDYPRUNE_INLINE __host__ __device__ __forceinline__
#else
#define GREEDYPRUNE_INLINE inline __attribute__((always_inline))
#endif
