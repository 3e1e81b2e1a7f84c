// Scoring candidates on a GPU, for candidate_loss.cu and candidate_slope.cu: a sum over samples and
// outputs for every candidate, without an array of size (N, m, C).
//
// A block takes a few units and one piece of the samples, and each warp takes its tiles of the
// piece. A thread holds units x samples outputs in registers and goes through the classes. It loads
// base once for all its units, and the units' weights from shared memory once for all its samples.
// Sums over the outputs and over a thread's samples of one tile are in Real, all others in
// float64. Their order depends on m alone, and there are no atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

// The work of one launch. Samples are those of `features`.
template <class Real>
struct Scoring {
  double* partial;       // (n, pieces)
  const int64_t* units;  // (n), or null: all
  const int64_t* count;  // the number of them on the device, or null: n
  int64_t n;
  Features features;
  const double* reach;    // (N) or null: see kernels.h
  double most_reach;      // the largest reach times scale for which Near will do; may be infinite
  const Real* outgoing;   // (N, C)
  Real scale;             // of the outgoing weights
  const Real* base;       // (C, m)
  int64_t base_stride;    // between its rows
  Target<Real> target;    // .scale is not used
  int64_t target_stride;  // between the rows of its value and weight
  bool vectors;           // every row is aligned for 16-byte loads
};

template <class Real>
__device__ __forceinline__ int64_t unit_at(const Scoring<Real>& p, int64_t n, int64_t i) {
  i = i < n ? i : n - 1;  // the last block repeats the last candidate
  return p.units ? p.units[i] : i;
}

template <class Real>
struct Tiling {
  static constexpr int units = units_a_thread(sizeof(Real));
  static constexpr int samples = samples_a_thread(sizeof(Real));
  static constexpr int classes = classes_a_chunk(sizeof(Real));
  static constexpr int64_t tile = tile_of(sizeof(Real));
};

// A block's units, and their outgoing weights (times scale) of some classes at a time.
template <class Real>
struct alignas(16) Chunk {
  Real at[Tiling<Real>::classes][Tiling<Real>::units];
  int64_t unit[Tiling<Real>::units];
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

template <class Real, class T>
__device__ __forceinline__ Real real_of(T x) {
  return static_cast<Real>(x);
}
template <class Real>
__device__ __forceinline__ Real real_of(__nv_bfloat16 x) {
  return static_cast<Real>(__bfloat162float(x));
}
template <class Real>
__device__ __forceinline__ Real real_of(__half x) {
  return static_cast<Real>(__half2float(x));
}

// Where this thread's samples are in its warp's tile: side by side for vector loads, else a warp
// apart. The lanes' loads are contiguous either way.
struct Lane {
  int64_t live;  // samples in the tile
  bool vectors;

  template <int kSamples>
  __device__ __forceinline__ int64_t at(int i) const {
    const int64_t lane = threadIdx.x % kLanes;
    return vectors ? lane * kSamples + i : lane + i * kLanes;
  }

  // row: at the tile's first sample. Samples beyond the last count as zero.
  template <class T, class Real, int kSamples>
  __device__ __forceinline__ void load(Real (&out)[kSamples], const T* row) const {
    if (vectors && live >= kLanes * kSamples) {
      const Pack<T, kSamples> pack =
          *reinterpret_cast<const Pack<T, kSamples>*>(row + at<kSamples>(0));
#pragma unroll
      for (int i = 0; i < kSamples; ++i) out[i] = real_of<Real>(pack.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kSamples; ++i)
        out[i] = at<kSamples>(i) < live ? real_of<Real>(row[at<kSamples>(i)]) : Real(0);
    }
  }

  // 1 for the tile's samples, 0 beyond.
  template <class Real, int kSamples>
  __device__ __forceinline__ void ones(Real (&out)[kSamples]) const {
#pragma unroll
    for (int i = 0; i < kSamples; ++i) out[i] = at<kSamples>(i) < live ? Real(1) : Real(0);
  }
};

// One thread's tile: kCount of the block's units, from `first` on.
template <int kCount, class Real>
struct Tile {
  static constexpr int kSamples = Tiling<Real>::samples;
  Real features[kCount][kSamples];
  const Chunk<Real>* chunk;  // of classes [from, to)
  int first;
  int64_t from, to;
  int64_t sample;  // the tile's first
  Lane lane;

  __device__ __forceinline__ void weights_of(Real (&w)[kCount], int64_t c) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) w[u] = chunk->at[c - from][first + u];
  }

  // body(u, i, times * base + h_u w_uc) for every class c of the chunk.
  template <class Body>
  __device__ __forceinline__ void each_output(const Scoring<Real>& p, Real times,
                                              const Body& body) const {
    const Real* row = p.base + from * p.base_stride + sample;
#pragma unroll 1
    for (int64_t c = from; c < to; ++c, row += p.base_stride) {
      Real base[kSamples], w[kCount];
      lane.load(base, row);
      weights_of(w, c);
#pragma unroll
      for (int i = 0; i < kSamples; ++i) {
        base[i] *= times;
#pragma unroll
        for (int u = 0; u < kCount; ++u) body(u, i, fma(features[u][i], w[u], base[i]));
      }
    }
  }
};

// The sums of the block's units [from_unit, from_unit + kCount) over samples [begin, end). Each
// warp writes its own into sums[warp].
template <template <int, class> class Criterion, int kCount, class Feature, class Real>
__device__ __forceinline__ void score_piece(const Scoring<Real>& p, int from_unit, int64_t begin,
                                            int64_t end, Chunk<Real>* chunk,
                                            double (*sums)[Tiling<Real>::units]) {
  using T = Tiling<Real>;
  const int64_t outputs = p.target.outputs;
  const unsigned warp = threadIdx.x / kLanes;
  Tile<kCount, Real> tile;
  tile.chunk = chunk;
  tile.first = from_unit;
  double total[kCount] = {};
  for (int64_t s = begin; s < end; s += kScoreWarps * T::tile) {  // the same in every warp
    tile.sample = s + warp * T::tile;
    tile.lane = {end - tile.sample, p.vectors};
#pragma unroll
    for (int u = 0; u < kCount; ++u)
      tile.lane.load(tile.features[u], static_cast<const Feature*>(p.features.data) +
                                           chunk->unit[from_unit + u] * p.features.stride +
                                           tile.sample);
    Criterion<kCount, Real> criterion;
    for (tile.from = 0; tile.from < outputs; tile.from += T::classes) {
      tile.to = tile.from + T::classes < outputs ? tile.from + T::classes : outputs;
      if (s == begin || outputs > T::classes) {
        __syncthreads();
        for (int64_t i = threadIdx.x; i < (tile.to - tile.from) * T::units; i += blockDim.x) {
          const int64_t u = i % T::units, c = i / T::units;
          chunk->at[c][u] = p.scale * p.outgoing[chunk->unit[u] * outputs + tile.from + c];
        }
        __syncthreads();
      }
      if (tile.lane.live > 0) criterion.add(p, tile);
    }
    if (tile.lane.live <= 0) continue;
    Real sum[kCount];
    criterion.finish(sum, p, tile);
#pragma unroll
    for (int u = 0; u < kCount; ++u) total[u] += static_cast<double>(sum[u]);
  }
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const double sum = warp_sum(total[u]);
    if (threadIdx.x % kLanes == 0) sums[warp][from_unit + u] = sum;
  }
}

// Scores a block's units by the criterion Near, or, where one of them reaches too far, by Far with
// half as many units at a time.
template <template <int, class> class Near, template <int, class> class Far, class Feature,
          class Real>
__global__ void __launch_bounds__(kScoreWarps* kLanes, resident_blocks(sizeof(Real)))
    score(Scoring<Real> p) {
  using T = Tiling<Real>;
  __shared__ Chunk<Real> chunk;
  __shared__ double sums[kScoreWarps][T::units];
  const int64_t n = p.count ? *p.count : p.n;
  const Pieces pieces = pieces_of(p.features.samples);
  const int64_t groups = ceil_div(n, T::units);
  for (int64_t item = blockIdx.x; item < groups * pieces.count; item += gridDim.x) {
    const int64_t first = item % groups * T::units, piece = item / groups;
    const int64_t begin = piece * pieces.size;
    const int64_t end =
        begin + pieces.size < p.features.samples ? begin + pieces.size : p.features.samples;
    if (threadIdx.x < T::units) chunk.unit[threadIdx.x] = unit_at(p, n, first + threadIdx.x);
    __syncthreads();
    const unsigned lane = threadIdx.x % kLanes;  // each lane checks one unit
    bool leaves = p.most_reach < HUGE_VALF && !p.reach;
    if (p.most_reach < HUGE_VALF && p.reach && lane < T::units)
      leaves = !(p.reach[chunk.unit[lane]] * fabs(static_cast<double>(p.scale)) <= p.most_reach);
    const bool far = __ballot_sync(kAllLanes, leaves) != 0;
    if (!far) {
      score_piece<Near, T::units, Feature>(p, 0, begin, end, &chunk, sums);
    } else {
      for (int half = 0; half < T::units; half += T::units / 2)
        score_piece<Far, T::units / 2, Feature>(p, half, begin, end, &chunk, sums);
    }
    __syncthreads();
    if (threadIdx.x < T::units && first + threadIdx.x < n) {
      double total = 0;
      for (int warp = 0; warp < kScoreWarps; ++warp) total += sums[warp][threadIdx.x];
      p.partial[(first + threadIdx.x) * pieces.count + piece] = total;
    }
    __syncthreads();
  }
}

inline int64_t multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <class T>
bool aligned(const T* row, int64_t stride, int64_t samples) {
  const auto bytes = static_cast<std::uintptr_t>(samples) * sizeof(T);
  return reinterpret_cast<std::uintptr_t>(row) % bytes == 0 && stride % samples == 0;
}

// Launches `score` for the features' type.
template <template <int, class> class Near, template <int, class> class Far, class Real>
void launch_score(Launcher& launch, Scoring<Real> p) {
  constexpr int64_t samples = Tiling<Real>::samples;
  p.vectors = aligned(p.base, p.base_stride, samples) &&
              (!p.target.value || aligned(p.target.value, p.target_stride, samples)) &&
              (!p.target.weight || aligned(p.target.weight, p.target_stride, samples));
  const int64_t items = ceil_div(p.n, Tiling<Real>::units) * pieces_of(p.features.samples).count;
  const int64_t blocks = blocks_of(items, multiprocessors(), resident_blocks(sizeof(Real)));
  constexpr int threads = kScoreWarps * kLanes;
  const auto start = [&](auto kernel, auto feature) {
    using Feature = decltype(feature);
    p.vectors = p.vectors &&
                aligned(static_cast<const Feature*>(p.features.data), p.features.stride, samples);
    launch(kernel, blocks, threads, p);
  };
  switch (p.features.type) {
    case Type::float32:
      return start(score<Near, Far, float, Real>, float());
    case Type::float64:
      return start(score<Near, Far, double, Real>, double());
    case Type::bfloat16:
      return start(score<Near, Far, __nv_bfloat16, Real>, __nv_bfloat16());
    case Type::float16:
      return start(score<Near, Far, __half, Real>, __half());
  }
}

// Adds up the pieces of a launch, one score a warp: scores[i] = scale * sum of partial[i]. `finish`
// may add to the score, and returns its error.
template <class Finish>
__global__ void __launch_bounds__(kScoreWarps* kLanes)
    sum_pieces(double* scores, double* errors, const double* partial, const int64_t* units,
               const int64_t* count, int64_t most, int64_t pieces, double scale, Finish finish) {
  const int64_t n = count ? *count : most, warps = blockDim.x / kLanes;
  const int64_t lane = threadIdx.x % kLanes;
  finish.start();
  for (int64_t i = blockIdx.x * warps + threadIdx.x / kLanes; i < n; i += gridDim.x * warps) {
    double total = 0;
    for (int64_t p = lane; p < pieces; p += kLanes) total += partial[i * pieces + p];
    total = warp_sum(total);
    if (lane != 0) continue;
    double score = scale * total;
    const double error = finish(&score, total, i, units ? units[i] : i);
    scores[i] = score;
    if (errors) errors[i] = error;
  }
}

struct Plain {
  __device__ void start() {}
  __device__ double operator()(double*, double, int64_t, int64_t) const { return 0; }
};

template <class Finish>
void launch_sum(Launcher& launch, double* scores, double* errors, const double* partial,
                const int64_t* units, const int64_t* count, int64_t n, int64_t samples,
                double scale, const Finish& finish) {
  const int64_t blocks = blocks_of(ceil_div(n, kScoreWarps), multiprocessors(), 4);
  launch(sum_pieces<Finish>, blocks, kScoreWarps * kLanes, scores, errors, partial, units, count, n,
         pieces_of(samples).count, scale, finish);
}

// One launch for candidates' losses (scale: shrink) or slopes (base: the gradient). The kernels are
// in candidate_loss.cu and candidate_slope.cu.
void score_losses(Launcher& launch, Scoring<float> p);
void score_losses(Launcher& launch, Scoring<double> p);
void score_slopes(Launcher& launch, Scoring<float> p);
void score_slopes(Launcher& launch, Scoring<double> p);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
