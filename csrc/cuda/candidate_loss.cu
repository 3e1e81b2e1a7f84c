// The loss of every candidate unit, as cpu/candidate_loss.cpp computes it, on a GPU:
//
//     losses[i] = scale * sum_s weight_s l(base[:, s] + shrink phi_u(s)),   u = units[i]
//
// Nothing of size (N, m, C) is stored. A warp takes kUnits candidates and walks over the samples.
// A thread holds kUnits x kSamples outputs at a time in registers: an element of base, once
// loaded, serves kUnits candidates, and one of w kSamples samples. The warps of a block take other
// candidates and the same samples, so all but the first to come find base in L1.
//
// Where the CPU multiplies w by shrink, a thread multiplies its h: once a sample, not once an
// output. Sums over the outputs and over a thread's kSamples samples are in Real, all others in
// float64, in an order that depends on n and m alone. No atomics.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>

#include "../kernels.h"
#include "../loss.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;  // a block
constexpr int kUnits = 4;  // a warp
constexpr int64_t kGroup = kWarps * kUnits;
constexpr int64_t kTile = 64;  // pieces are whole tiles: a multiple of what a warp takes at once

template <class Real>
constexpr int kSamples = sizeof(Real) == sizeof(float) ? 2 : 1;  // a thread: more would spill

// One thread's work; the pointers but outgoing are at the first sample that its warp holds.
template <class Real>
struct Tile {
  Real features[kUnits][kSamples<Real>];  // times shrink
  const Real* outgoing[kUnits];           // (C)
  const Real* base;                       // (C, stride)
  const Real* value;
  const Real* weight;
  const int32_t* label;
  int64_t outputs, stride;
  unsigned at[kSamples<Real>];  // this thread's samples
};

template <class Real>
using Losses = Real[kUnits][kSamples<Real>];

template <class Elementwise>
struct SumOverOutputs {
  template <class Real>
  static __device__ __forceinline__ void losses(Losses<Real>& loss, const Tile<Real>& t) {
#pragma unroll 2
    for (int64_t c = 0; c < t.outputs; ++c) {
      const int64_t row = c * t.stride;
      Real w[kUnits];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) w[u] = t.outgoing[u][c];
#pragma unroll
      for (int i = 0; i < kSamples<Real>; ++i) {
        const Real base = (t.base + row)[t.at[i]];
        const Real y = t.value ? (t.value + row)[t.at[i]] : Real(0);  // squared error reads none
        const Real weight = t.weight ? (t.weight + row)[t.at[i]] : Real(1);
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const Real x = fma(t.features[u][i], w[u], base);
          loss[u][i] += weight * Elementwise::loss(x, y);
        }
      }
    }
  }
};

// Two passes over the classes: to form a logit again is one fma, while an online log-sum-exp takes
// a second exponential or a branch. fma is spelled out so that both passes round alike.
struct CrossEntropy {
  template <class Real>
  static __device__ __forceinline__ void losses(Losses<Real>& loss, const Tile<Real>& t) {
    Losses<Real> highest, sum = {};
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int i = 0; i < kSamples<Real>; ++i) highest[u][i] = -HUGE_VALF;
#pragma unroll 4
    for (int64_t c = 0; c < t.outputs; ++c)
#pragma unroll
      for (int i = 0; i < kSamples<Real>; ++i) {
        const Real base = (t.base + c * t.stride)[t.at[i]];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const Real x = fma(t.features[u][i], t.outgoing[u][c], base);
          highest[u][i] = larger(highest[u][i], x);
        }
      }
#pragma unroll 4
    for (int64_t c = 0; c < t.outputs; ++c)
#pragma unroll
      for (int i = 0; i < kSamples<Real>; ++i) {
        const Real base = (t.base + c * t.stride)[t.at[i]];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const Real x = fma(t.features[u][i], t.outgoing[u][c], base);
          sum[u][i] += exp_nonpositive(x - highest[u][i]);
        }
      }
#pragma unroll
    for (int i = 0; i < kSamples<Real>; ++i) {
      const int32_t label = t.label[t.at[i]];
      const Real base = (t.base + label * t.stride)[t.at[i]];
      const Real weight = t.weight ? t.weight[t.at[i]] : Real(1);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const Real own = fma(t.features[u][i], t.outgoing[u][label], base);
        loss[u][i] = weight * cross_entropy(highest[u][i], sum[u][i], own);
      }
    }
  }
};

// The sum over the lanes, in lane 0.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;
}

// Block (g, p) sums the p-th piece of the samples for the g-th group of candidates.
template <class Criterion, class Feature, class Real>
__global__ void __launch_bounds__(kLanes* kWarps)
    partial_losses(double* partial,       // (n, pieces)
                   const int64_t* units,  // (n)
                   int64_t n, Features features,
                   const Real* outgoing,  // (N, C)
                   Real shrink,
                   const Real* base,  // (C, m)
                   Target<Real> target, int64_t piece) {
  const int64_t first = blockIdx.x * kGroup + threadIdx.y * kUnits;
  if (first >= n) return;  // the whole warp
  const int64_t begin = blockIdx.y * piece;
  const int64_t end = begin + piece < features.samples ? begin + piece : features.samples;

  Tile<Real> tile;
  tile.outputs = target.outputs;
  tile.stride = features.samples;
  const Feature* rows[kUnits];
  double total[kUnits] = {};
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {  // the last warp repeats the last candidate
    const int64_t unit = units[first + u < n ? first + u : n - 1];
    tile.outgoing[u] = outgoing + unit * target.outputs;
    rows[u] = static_cast<const Feature*>(features.data) + unit * features.stride;
  }
  for (int64_t s = begin; s < end; s += kLanes * kSamples<Real>) {
    const unsigned live = static_cast<unsigned>(end - s < kTile ? end - s : kTile);
    tile.base = base + s;
    tile.value = target.value ? target.value + s : nullptr;
    tile.weight = target.weight ? target.weight + s : nullptr;
    tile.label = target.label ? target.label + s : nullptr;
#pragma unroll
    for (int i = 0; i < kSamples<Real>; ++i) {  // kLanes apart: the lanes' loads are contiguous
      const unsigned at = i * kLanes + threadIdx.x;
      tile.at[i] = at < live ? at : live - 1;  // lanes beyond the end repeat its last sample
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        tile.features[u][i] = shrink * static_cast<Real>((rows[u] + s)[tile.at[i]]);
    }
    Losses<Real> loss = {};
    Criterion::losses(loss, tile);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      Real sum = 0;
#pragma unroll
      for (int i = 0; i < kSamples<Real>; ++i)
        sum += i * kLanes + threadIdx.x < live ? loss[u][i] : Real(0);
      total[u] += static_cast<double>(sum);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const double sum = warp_sum(total[u]);
    if (threadIdx.x == 0 && first + u < n) partial[(first + u) * gridDim.y + blockIdx.y] = sum;
  }
}

// A warp adds up one candidate's pieces.
__global__ void __launch_bounds__(kLanes* kWarps)
    sum_pieces(double* losses,         // (n)
               const double* partial,  // (n, pieces)
               int64_t n, int64_t pieces, double scale) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (i >= n) return;
  double total = 0;
  for (int64_t p = threadIdx.x; p < pieces; p += kLanes) total += partial[i * pieces + p];
  total = warp_sum(total);
  if (threadIdx.x == 0) losses[i] = scale * total;
}

// ---------------------------------------------------------------------------------------------

thread_local cudaError_t last = cudaSuccess;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Real>
using Kernel = void (*)(double*, const int64_t*, int64_t, Features, const Real*, Real, const Real*,
                        Target<Real>, int64_t);

template <class Feature, class Real>
Kernel<Real> kernel_for(Loss loss) {
  switch (loss) {
    case Loss::squared_error:
      return partial_losses<SumOverOutputs<SquaredError>, Feature, Real>;
    case Loss::logistic:
      return partial_losses<SumOverOutputs<Logistic>, Feature, Real>;
    case Loss::cross_entropy:
      return partial_losses<CrossEntropy, Feature, Real>;
  }
  return nullptr;
}

template <class Real>
Status candidate_loss(double* losses, double* partial, const int64_t* units, int64_t n,
                      const Features& features, const Real* outgoing, double shrink,
                      const Real* base, const Target<Real>& target, void* cuda_stream) {
  if (n < 1) return Status::ok;  // CUDA refuses an empty grid
  const auto kernel = features.type == Type::float32 ? kernel_for<float, Real>(target.loss)
                                                     : kernel_for<double, Real>(target.loss);
  if (!kernel) return Status::bad_argument;
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const int64_t pieces = cuda::candidate_loss_splits(n, features.samples);
  const int64_t piece = kTile * ceil_div(ceil_div(features.samples, kTile), pieces);
  const dim3 block(kLanes, kWarps);
  const dim3 grid(static_cast<unsigned>(ceil_div(n, kGroup)), static_cast<unsigned>(pieces));
  kernel<<<grid, block, 0, stream>>>(partial, units, n, features, outgoing,
                                     static_cast<Real>(shrink), base, target, piece);
  last = cudaGetLastError();
  if (last != cudaSuccess) return Status::device_error;
  const dim3 sum_grid(static_cast<unsigned>(ceil_div(n, kWarps)));
  sum_pieces<<<sum_grid, block, 0, stream>>>(losses, partial, n, pieces, target.scale);
  last = cudaGetLastError();
  return last == cudaSuccess ? Status::ok : Status::device_error;
}

}  // namespace
}  // namespace GREEDYPRUNE_ISA

namespace cuda {
using namespace GREEDYPRUNE_ISA;

// Enough blocks for several rounds on the largest devices, so that the last one's idle part is
// small; but no piece so short that a block's start and end would show. Not a function of the
// device at hand: the order of the sums, and so their last bits, must not depend on it.
int64_t candidate_loss_splits(int64_t n, int64_t samples) {
  constexpr int64_t kBlocks = 4096, kShortest = 2 * kTile;
  if (n < 1 || samples < 1) return 1;
  const int64_t wanted = ceil_div(kBlocks, ceil_div(n, kGroup));
  const int64_t most = ceil_div(samples, kShortest);
  return most < wanted ? most : wanted;
}

Status candidate_loss_f32(double* losses, double* partial, const int64_t* units, int64_t n,
                          const Features& features, const float* outgoing, double shrink,
                          const float* base, const Target<float>& target, void* stream) {
  return candidate_loss(losses, partial, units, n, features, outgoing, shrink, base, target,
                        stream);
}

Status candidate_loss_f64(double* losses, double* partial, const int64_t* units, int64_t n,
                          const Features& features, const double* outgoing, double shrink,
                          const double* base, const Target<double>& target, void* stream) {
  return candidate_loss(losses, partial, units, n, features, outgoing, shrink, base, target,
                        stream);
}

const char* last_error() {
  thread_local char text[256];
  std::snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(last), cudaGetErrorString(last));
  return text;
}

}  // namespace cuda
}  // namespace greedyprune
