// The loss of every candidate unit, as cpu/candidate_loss.cpp computes it, on a GPU:
//
//     losses[i] = scale * sum_s weight_s l(base[:, s] + shrink phi_u(s)),   u = units[i]
//
// candidates.h says how the work is laid out. Exponentials and logarithms are to base 2 inside.
#include <cstdio>

#include "candidates.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

thread_local cudaError_t last_status = cudaSuccess;

namespace {

template <class Elementwise>
struct SumOverOutputs {
  template <int kCount, class Real>
  struct Criterion {
    Real sum_[kCount] = {};

    __device__ __forceinline__ void add(const Scoring<Real>& p, const Tile<kCount, Real>& t) {
      constexpr int kSamples = Tiling<Real>::samples;
      const Real *value = p.target.value, *weight = p.target.weight;
      for (int64_t from = t.from; from < t.to; from += kTerms) {
        const int64_t to = from + kTerms < t.to ? from + kTerms : t.to;
        Real part[kCount] = {};
        for (int64_t c = from; c < to; ++c) {
          const int64_t at = c * p.target_stride + t.sample;
          Real base[kSamples], y[kSamples] = {}, share[kSamples], w[kCount];
          t.lane.load(base, p.base + c * p.base_stride + t.sample);
          if (value) t.lane.load(y, value + at);  // squared error reads none
          if (weight)
            t.lane.load(share, weight + at);
          else
            t.lane.ones(share);
          t.weights_of(w, c);
#pragma unroll
          for (int i = 0; i < kSamples; ++i) {
#pragma unroll
            for (int u = 0; u < kCount; ++u) {
              const Real x = fma(t.features[u][i], w[u], base[i]);
              part[u] += share[i] * Elementwise::loss(x, y[i]);
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kCount; ++u) sum_[u] += part[u];
      }
    }

    __device__ __forceinline__ void finish(Real (&sum)[kCount], const Scoring<Real>&,
                                           const Tile<kCount, Real>&) const {
#pragma unroll
      for (int u = 0; u < kCount; ++u) sum[u] = sum_[u];
    }
  };
};

template <class Real>
constexpr Real kUnit = static_cast<Real>(kLog2E);

// log(sum of exp(x_c)) - x_label. kFar: a unit can move an output further than ExponentRange
// allows. Then the highest output of each chunk of classes is found before its exponentials are
// added up. To form an output a second time is one multiply-add.
template <bool kFar, int kCount, class Real>
struct CrossEntropy {
  static constexpr int kSamples = Tiling<Real>::samples;
  Real sum_[kCount][kSamples] = {};
  Real highest_[kFar ? kCount : 1][kFar ? kSamples : 1];

  __device__ __forceinline__ CrossEntropy() {
    if constexpr (kFar) {
#pragma unroll
      for (int u = 0; u < kCount; ++u)
#pragma unroll
        for (int i = 0; i < kSamples; ++i) highest_[u][i] = -Real(HUGE_VALF);
    }
  }

  __device__ __forceinline__ void add(const Scoring<Real>& p, const Tile<kCount, Real>& t) {
    if constexpr (kFar) {
      Real before[kCount][kSamples];
#pragma unroll
      for (int u = 0; u < kCount; ++u)
#pragma unroll
        for (int i = 0; i < kSamples; ++i) before[u][i] = highest_[u][i];
      t.each_output(p, kUnit<Real>,
                    [&](int u, int i, Real x) { highest_[u][i] = larger(highest_[u][i], x); });
#pragma unroll
      for (int u = 0; u < kCount; ++u)
#pragma unroll
        for (int i = 0; i < kSamples; ++i)
          if (sum_[u][i] > 0) sum_[u][i] *= exp2_upto(before[u][i] - highest_[u][i]);
      t.each_output(p, kUnit<Real>,
                    [&](int u, int i, Real x) { sum_[u][i] += exp2_upto(x - highest_[u][i]); });
    } else {
      t.each_output(p, kUnit<Real>, [&](int u, int i, Real x) { sum_[u][i] += exp2_upto(x); });
    }
  }

  __device__ __forceinline__ void finish(Real (&sum)[kCount], const Scoring<Real>& p,
                                         const Tile<kCount, Real>& t) const {
    Real share[kSamples];
    t.lane.ones(share);
    if (p.target.weight) t.lane.load(share, p.target.weight + t.sample);
#pragma unroll
    for (int u = 0; u < kCount; ++u) sum[u] = 0;
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const int64_t at = t.lane.template at<kSamples>(i);
      if (at >= t.lane.live) continue;
      const int label = p.target.label[t.sample + at];
      const Real base = kUnit<Real> * p.base[label * p.base_stride + t.sample + at];
      Real w[kCount];
      if (p.target.outputs <= Tiling<Real>::classes) {  // the chunk holds all classes
#pragma unroll
        for (int u = 0; u < kCount; ++u) w[u] = t.chunk->at[label][t.first + u];
      } else {
#pragma unroll
        for (int u = 0; u < kCount; ++u)
          w[u] = p.scale * p.outgoing[t.chunk->unit[t.first + u] * p.target.outputs + label];
      }
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        Real of_label = fma(t.features[u][i], w[u], base);
        if constexpr (kFar) of_label -= highest_[u][i];
        sum[u] += share[i] * (log_normal(sum_[u][i]) - static_cast<Real>(kLn2) * of_label);
      }
    }
  }
};

template <int kCount, class Real>
using Near = CrossEntropy<false, kCount, Real>;
template <int kCount, class Real>
using Far = CrossEntropy<true, kCount, Real>;

template <class Real>
void launch_losses(Launcher& launch, Scoring<Real> p) {
  switch (p.target.loss) {
    case Loss::squared_error:
      p.target.value = nullptr;  // base is relative to it
      return launch_score<SumOverOutputs<SquaredError>::Criterion,
                          SumOverOutputs<SquaredError>::Criterion>(launch, p);
    case Loss::logistic:
      return launch_score<SumOverOutputs<Logistic>::Criterion, SumOverOutputs<Logistic>::Criterion>(
          launch, p);
    case Loss::cross_entropy:
      p.scale *= kUnit<Real>;
      p.most_reach = static_cast<double>(ExponentRange<Real>::reach);
      return launch_score<Near, Far>(launch, p);
  }
}

template <class Real>
Status candidate_loss(double* losses, double* partial, const int64_t* units, int64_t n,
                      const Features& features, const double* reach, const Real* outgoing,
                      double shrink, const Real* base, const Target<Real>& target, void* stream) {
  Launcher launch(stream);
  const int64_t m = features.samples;
  score_losses(launch, {partial, units, nullptr, n, features, reach, HUGE_VALF, outgoing,
                        static_cast<Real>(shrink), base, m, target, m, false});
  launch_sum(launch, losses, nullptr, partial, units, nullptr, n, m, target.scale, Plain());
  return launch.status();
}

}  // namespace

void score_losses(Launcher& launch, Scoring<float> p) { launch_losses(launch, p); }
void score_losses(Launcher& launch, Scoring<double> p) { launch_losses(launch, p); }

}  // namespace GREEDYPRUNE_ISA

// ---------------------------------------------------------------------------------------------

namespace cuda {
using namespace GREEDYPRUNE_ISA;

int64_t candidate_pieces(int64_t samples) { return pieces_of(samples).count; }

Status candidate_loss_f32(double* losses, double* partial, const int64_t* units, int64_t n,
                          const Features& features, const double* reach, const float* outgoing,
                          double shrink, const float* base, const Target<float>& target,
                          void* stream) {
  return candidate_loss(losses, partial, units, n, features, reach, outgoing, shrink, base, target,
                        stream);
}

Status candidate_loss_f64(double* losses, double* partial, const int64_t* units, int64_t n,
                          const Features& features, const double* reach, const double* outgoing,
                          double shrink, const double* base, const Target<double>& target,
                          void* stream) {
  return candidate_loss(losses, partial, units, n, features, reach, outgoing, shrink, base, target,
                        stream);
}

const char* last_error() {
  thread_local char text[256];
  std::snprintf(text, sizeof text, "%s: %s", cudaGetErrorName(last_status),
                cudaGetErrorString(last_status));
  return text;
}

}  // namespace cuda
}  // namespace greedyprune
