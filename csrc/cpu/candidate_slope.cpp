// The derivative of the loss in every candidate unit, slopes[j] = <gradient, phi_j> with phi_j =
// h_j w_j; and the gradient of the loss in the outputs, which the slopes need.
#include "candidate_slope.h"

#include <cmath>

#include "../loss.h"
#include "../rounding.h"
#include "features.h"
#include "groups.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

template <int kCount, class Feature, class Real>
struct SlopeGroup {
  using Vector = typename Lanes<Real>::Vector;
  using Wide = typename Lanes<Real>::Wide;
  const Feature* features[kCount];  // (m) each
  const Real* outgoing[kCount];     // (C) each
  Wide slope[kCount] = {}, squares[kCount] = {};

  // Adds samples [first, last): at most a tile, either whole vectors or a part of one.
  template <bool kWhole>
  void add(const Real* gradient, int64_t outputs, int64_t samples, int64_t first, int64_t last) {
    Vector tile_slope[kCount] = {}, tile_squares[kCount] = {};
    for (int64_t s = first; s < last; s += Lanes<Real>::count) {
      Vector along[kCount] = {};  // <gradient, w> at each sample
      for (int64_t c = 0; c < outputs; ++c) {
        const Vector g = load_lanes<Vector, kWhole>(gradient + c * samples + s, last - s);
        for (int u = 0; u < kCount; ++u) along[u] += g * outgoing[u][c];
      }
      for (int u = 0; u < kCount; ++u) {
        const Vector h = load_lanes<Vector, kWhole>(features[u] + s, last - s);
        tile_slope[u] += h * along[u];
        tile_squares[u] += h * h;
      }
    }
    for (int u = 0; u < kCount; ++u) {
      slope[u] += __builtin_convertvector(tile_slope[u], Wide);
      squares[u] += __builtin_convertvector(tile_squares[u], Wide);
    }
  }
};

template <class Feature, class Real>
Status slopes_of(double* slopes, double* errors, const int64_t* units, int64_t n,
                 const Features& features, const Real* outgoing, const Real* gradient,
                 int64_t outputs, const Caller& caller) {
  constexpr int64_t lanes = Lanes<Real>::count;
  const int64_t samples = features.samples;
  double gradient_squares = 0;
  if (errors) {
    for (int64_t i = 0; i < outputs * samples; ++i)
      gradient_squares += static_cast<double>(gradient[i]) * static_cast<double>(gradient[i]);
  }
  const double terms = slope_rounding<Real>(outputs, kTile / lanes, samples / kTile);
  const auto score = [&](auto size, int64_t at) {
    constexpr int count = decltype(size)::value;
    SlopeGroup<count, Feature, Real> group;
    point_at<count>(group.features, group.outgoing, units + at, features, outgoing, outputs);
    for (int64_t s = 0; s < samples; s += kTile) {
      const int64_t end = s + kTile < samples ? s + kTile : samples;
      const int64_t whole = end - (end - s) % lanes;
      if (s < whole) group.template add<true>(gradient, outputs, samples, s, whole);
      if (whole < end) group.template add<false>(gradient, outputs, samples, whole, end);
    }
    for (int u = 0; u < count; ++u) {
      slopes[at + u] = sum_of(group.slope[u]);
      if (!errors) continue;
      double w_squares = 0;
      for (int64_t c = 0; c < outputs; ++c) {
        const double w = static_cast<double>(group.outgoing[u][c]);
        w_squares += w * w;
      }
      errors[at + u] = terms * std::sqrt(sum_of(group.squares[u]) * w_squares * gradient_squares);
    }
  };
  return in_groups(n, samples * outputs, caller, score) ? Status::ok : Status::stopped;
}

}  // namespace

// ---------------------------------------------------------------------------------------------

template <class Real>
Status candidate_slope(double* slopes, double* errors, const int64_t* units, int64_t n,
                       const Features& features, const Real* outgoing, const Real* gradient,
                       int64_t outputs, const Caller& caller) {
  const auto launch =
      features.type == Type::float32 ? slopes_of<float, Real> : slopes_of<double, Real>;
  return launch(slopes, errors, units, n, features, outgoing, gradient, outputs, caller);
}

template <class Real>
void outputs_gradient(Real* outputs, const Target<Real>& target, int64_t samples,
                      const Caller& caller) {
  const int64_t classes = target.outputs;
  const Real scale = static_cast<Real>(target.scale);
  parallel_blocks(samples, 4 * kTile, 8 * classes, caller, [&](int64_t first, int64_t last) {
    if (target.loss != Loss::cross_entropy) {
      for (int64_t c = 0; c < classes; ++c) {
        for (int64_t i = c * samples + first; i < c * samples + last; ++i) {
          const Real slope = target.loss == Loss::logistic
                                 ? Logistic::derivative(outputs[i], target.value[i])
                                 : SquaredError::derivative(outputs[i], Real(0));
          outputs[i] = scale * slope * (target.weight ? target.weight[i] : Real(1));
        }
      }
      return;
    }
    Real highest[4 * kTile], sum[4 * kTile];  // softmax(x) - onehot(label)
    for (int64_t s = first; s < last; ++s) {
      highest[s - first] = outputs[s];
      sum[s - first] = 0;
    }
    for (int64_t c = 1; c < classes; ++c)
      for (int64_t s = first; s < last; ++s)
        highest[s - first] = larger(highest[s - first], outputs[c * samples + s]);
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t s = first; s < last; ++s) {
        Real& x = outputs[c * samples + s];
        x = exp_nonpositive(x - highest[s - first]);
        sum[s - first] += x;
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t s = first; s < last; ++s) {
        Real& x = outputs[c * samples + s];
        x = x / sum[s - first] - (target.label[s] == c ? Real(1) : Real(0));
        x *= scale * (target.weight ? target.weight[s] : Real(1));
      }
    }
  });
}

template void outputs_gradient<double>(double*, const Target<double>&, int64_t, const Caller&);
template Status candidate_slope<float>(double*, double*, const int64_t*, int64_t, const Features&,
                                       const float*, const float*, int64_t, const Caller&);
template Status candidate_slope<double>(double*, double*, const int64_t*, int64_t, const Features&,
                                        const double*, const double*, int64_t, const Caller&);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
