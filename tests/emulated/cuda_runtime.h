// CUDA on the host, as far as csrc/cuda uses it, so that tests run the same kernels without a GPU.
// A block's threads are fibers, which change at barriers and shuffles only; blocks run one after
// the other. This finds wrong results, barriers that not all threads reach, and results that depend
// on the threads' order, which EMULATED_ORDER=reverse reverses. It cannot find wrong memory
// ordering, and does not have the GPU's speed or exp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not overlap
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
// Waits for the other threads of the block, or of the warp.
void wait_for_block();
void wait_for_warp();
uint64_t* warp_slots();  // one for each lane
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);
}  // namespace emulated

inline void __syncthreads() { emulated::wait_for_block(); }
inline void __syncwarp(unsigned = ~0u) { emulated::wait_for_warp(); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one slot");
  uint64_t* slots = emulated::warp_slots();
  std::memcpy(slots + threadIdx.x % 32, &value, sizeof value);
  emulated::wait_for_warp();
  std::memcpy(&value, slots + from % 32, sizeof value);
  emulated::wait_for_warp();
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ with);
}

inline unsigned __ballot_sync(unsigned, bool flag) {
  uint64_t* slots = emulated::warp_slots();
  slots[threadIdx.x % 32] = flag;
  emulated::wait_for_warp();
  unsigned set = 0;
  for (unsigned i = 0; i < 32; ++i) set |= static_cast<unsigned>(slots[i] & 1) << i;
  emulated::wait_for_warp();
  return set;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T __ldcs(const T* address) {
  return *address;
}

using std::fabs;
using std::fma;
using std::fmax;
using std::fmin;
using std::isfinite;
using std::sqrt;

// ---------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  const void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Given&&... given) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (!grid.x || !grid.y || !block.x || block.x * block.y * block.z > 1024)
    return cudaErrorInvalidConfiguration;
  emulated::run(grid, block, [&] { kernel(static_cast<Expected>(given)...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // multiprocessors: few blocks, so that each takes several pieces of work
  return cudaSuccess;
}
