// slopes[i] = <gradient, phi_u>, u = units[i], as cpu/candidate_slope.cpp computes it, on a GPU.
// The product of weights and gradient at a sample comes first, then its product with the feature.
#include "candidates.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

template <int kCount, class Real>
struct Slope {
  static constexpr int kSamples = Tiling<Real>::samples;
  Real sum_[kCount][kSamples] = {};

  __device__ __forceinline__ void add(const Scoring<Real>& p, const Tile<kCount, Real>& t) {
    for (int64_t c = t.from; c < t.to; ++c) {
      Real gradient[kSamples], w[kCount];
      t.lane.load(gradient, p.base + c * p.base_stride + t.sample);
      t.weights_of(w, c);
#pragma unroll
      for (int u = 0; u < kCount; ++u)
#pragma unroll
        for (int i = 0; i < kSamples; ++i) sum_[u][i] = fma(w[u], gradient[i], sum_[u][i]);
    }
  }

  __device__ __forceinline__ void finish(Real (&sum)[kCount], const Scoring<Real>&,
                                         const Tile<kCount, Real>& t) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      sum[u] = 0;
#pragma unroll
      for (int i = 0; i < kSamples; ++i) sum[u] = fma(t.features[u][i], sum_[u][i], sum[u]);
    }
  }
};

template <class Real>
Status candidate_slope(double* slopes, double* partial, const int64_t* units, int64_t n,
                       const Features& features, const Real* outgoing, const Real* gradient,
                       int64_t outputs, void* stream) {
  Launcher launch(stream);
  const int64_t m = features.samples;
  Target<Real> none = {};
  none.outputs = outputs;
  score_slopes(launch, {partial, units, nullptr, n, features, nullptr, HUGE_VALF, outgoing, Real(1),
                        gradient, m, none, m, false});
  launch_sum(launch, slopes, nullptr, partial, units, nullptr, n, m, 1.0, Plain());
  return launch.status();
}

}  // namespace

void score_slopes(Launcher& launch, Scoring<float> p) { launch_score<Slope, Slope>(launch, p); }
void score_slopes(Launcher& launch, Scoring<double> p) { launch_score<Slope, Slope>(launch, p); }

}  // namespace GREEDYPRUNE_ISA

// ---------------------------------------------------------------------------------------------

namespace cuda {
using namespace GREEDYPRUNE_ISA;

Status candidate_slope_f32(double* slopes, double* partial, const int64_t* units, int64_t n,
                           const Features& features, const float* outgoing, const float* gradient,
                           int64_t outputs, void* stream) {
  return candidate_slope(slopes, partial, units, n, features, outgoing, gradient, outputs, stream);
}

Status candidate_slope_f64(double* slopes, double* partial, const int64_t* units, int64_t n,
                           const Features& features, const double* outgoing, const double* gradient,
                           int64_t outputs, void* stream) {
  return candidate_slope(slopes, partial, units, n, features, outgoing, gradient, outputs, stream);
}

}  // namespace cuda
}  // namespace greedyprune
