// What the CUDA files share: launches that keep their errors, sums and minima over a block in a
// fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../kernels.h"
#include "../loss.h"
#include "plan.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

using cuda::Progress;

extern thread_local cudaError_t last_status;

// Launches into one stream. After the first launch that fails it launches nothing more.
class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) {
    if (status_ != Status::ok || blocks < 1) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    last_status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (last_status != cudaSuccess) status_ = Status::device_error;
  }

  Status status() const { return status_; }

 private:
  cudaStream_t stream_;
  Status status_ = Status::ok;
};

// ---------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T lesser(T a, T b) {
  return b < a ? b : a;
}
__device__ __forceinline__ double lesser(double a, double b) {
  return fmin(a, b);
}  // the other one if one is NaN

// The sum over the warp, the same bits in every lane.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int with = kLanes / 2; with > 0; with /= 2) x += __shfl_xor_sync(kAllLanes, x, with);
  return x;
}

template <class T>
__device__ __forceinline__ T warp_min(T x) {
#pragma unroll
  for (int with = kLanes / 2; with > 0; with /= 2)
    x = lesser(x, __shfl_xor_sync(kAllLanes, x, with));
  return x;
}

// The same over the block, with the result in every thread. All threads have to call it.
template <class T, class Reduce>
__device__ __forceinline__ T over_block(T x, T neutral, T* shared, const Reduce& over_warp) {
  const unsigned lane = threadIdx.x % kLanes, warps = (blockDim.x + kLanes - 1) / kLanes;
  x = over_warp(x);
  if (lane == 0) shared[threadIdx.x / kLanes] = x;
  __syncthreads();
  x = over_warp(lane < warps ? shared[lane] : neutral);
  __syncthreads();
  return x;
}

__device__ __forceinline__ double block_sum(double x) {
  __shared__ double shared[kLanes];
  return over_block(x, 0.0, shared, [](double y) { return warp_sum(y); });
}

__device__ __forceinline__ double block_min(double x) {
  __shared__ double shared[kLanes];
  return over_block(x, static_cast<double>(HUGE_VALF), shared,
                    [](double y) { return warp_min(y); });
}

__device__ __forceinline__ int64_t block_min(int64_t x) {
  __shared__ int64_t shared[kLanes];
  return over_block(x, kNoUnit, shared, [](int64_t y) { return warp_min(y); });
}

// The number of threads before this one with `flag` set; `total` receives that of the whole block.
__device__ __forceinline__ int64_t block_rank(bool flag, int64_t* total) {
  __shared__ int counts[kLanes];
  const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes,
                 warps = (blockDim.x + kLanes - 1) / kLanes;
  const unsigned set = __ballot_sync(kAllLanes, flag);
  if (lane == 0) counts[warp] = __popc(set);
  __syncthreads();
  int before = __popc(set & ((1u << lane) - 1)), all = 0;
  for (unsigned i = 0; i < warps; ++i) {
    before += i < warp ? counts[i] : 0;
    all += counts[i];
  }
  __syncthreads();
  *total = all;
  return before;
}

// May this score be the lowest, allowing for rounding?
__device__ __forceinline__ bool is_contender(double score, double error, double lowest) {
  return !(score - error > lowest) || !isfinite(score) || !isfinite(error);
}

// Draws n of available[0:left]: the first steps of a Fisher-Yates shuffle move them to the front.
// One thread.
__device__ __forceinline__ void draw(int64_t* available, int64_t left, int64_t n,
                                     const double* draws) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t other = i + static_cast<int64_t>(draws[i] * static_cast<double>(left - i));
    const int64_t unit = available[i];
    available[i] = available[other];
    available[other] = unit;
  }
}

// Takes `unit` out of available[0:left]; the last unit takes its place. One block.
__device__ __forceinline__ void take(int64_t* available, int64_t left, int64_t unit) {
  const int64_t last = available[left - 1];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < left; i += blockDim.x)
    if (available[i] == unit) available[i] = last;
  __syncthreads();
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
