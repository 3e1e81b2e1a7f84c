// The loss of every candidate unit: losses[j] = L(base + shrink * phi_j), phi_j = h_j w_j.
//
// Scoring N candidates on m samples with C outputs takes m N C exponentials. Nothing of size
// (N, m, C) is ever stored: for a unit and a tile of samples the logits are formed on the fly (one
// multiply-add each, cheaper than keeping them), reduced over the outputs, and one number is added
// to the unit's loss. Sums over a tile are in Real, sums of tiles in float64, both in a fixed
// order, so that the number of threads never shows in the result.
#include "candidate_loss.h"

#include <cmath>

#include "../loss.h"
#include "parallel.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

// One tile of n samples of one unit; the pointers are at the tile's first sample.
template <class Real>
struct Tile {
  const Real* features;  // (n)
  const Real* outgoing;  // (C)
  Real shrink;
  const Real* base;  // (C, stride)
  const Real* value;
  const Real* weight;
  const int32_t* label;
  int64_t outputs, stride;
  int n;
};

template <class Real>
Tile<Real> tile_at(int64_t s, const Real* base, const Target<Real>& target, int64_t samples) {
  Tile<Real> tile;
  tile.features = nullptr;
  tile.outgoing = nullptr;
  tile.shrink = 0;
  tile.base = base + s;
  tile.value = target.value ? target.value + s : nullptr;
  tile.weight = target.weight ? target.weight + s : nullptr;
  tile.label = target.label ? target.label + s : nullptr;
  tile.outputs = target.outputs;
  tile.stride = samples;
  tile.n = static_cast<int>(samples - s < kTile ? samples - s : kTile);
  return tile;
}

template <class Real>
double cross_entropy_tile(const Tile<Real>& t) {
  Real highest[kTile], own[kTile], sum[kTile];
  for (int i = 0; i < t.n; ++i) {
    highest[i] = -HUGE_VALF;
    own[i] = 0;
    sum[i] = 0;
  }
  for (int64_t c = 0; c < t.outputs; ++c) {
    const Real w = t.shrink * t.outgoing[c];
    const Real* base = t.base + c * t.stride;
    const int32_t label = static_cast<int32_t>(c);
#pragma omp simd
    for (int i = 0; i < t.n; ++i) {
      const Real x = base[i] + t.features[i] * w;
      highest[i] = larger(highest[i], x);
      own[i] = t.label[i] == label ? x : own[i];
    }
  }
  for (int64_t c = 0; c < t.outputs; ++c) {
    const Real w = t.shrink * t.outgoing[c];
    const Real* base = t.base + c * t.stride;
#pragma omp simd
    for (int i = 0; i < t.n; ++i)
      sum[i] += exp_nonpositive(base[i] + t.features[i] * w - highest[i]);
  }
  double total = 0;
  if (t.weight) {
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < t.n; ++i)
      total += static_cast<double>(t.weight[i] * cross_entropy(highest[i], sum[i], own[i]));
  } else {
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < t.n; ++i)
      total += static_cast<double>(cross_entropy(highest[i], sum[i], own[i]));
  }
  return total;
}

template <class Elementwise, class Real>
double elementwise_tile(const Tile<Real>& t) {
  Real sum[kTile];
  for (int i = 0; i < t.n; ++i) sum[i] = 0;
  for (int64_t c = 0; c < t.outputs; ++c) {
    const Real w = t.shrink * t.outgoing[c];
    const Real* base = t.base + c * t.stride;
    const Real* value = t.value ? t.value + c * t.stride : base;  // squared error reads none
    if (t.weight) {
      const Real* weight = t.weight + c * t.stride;
#pragma omp simd
      for (int i = 0; i < t.n; ++i)
        sum[i] += weight[i] * Elementwise::loss(base[i] + t.features[i] * w, value[i]);
    } else {
#pragma omp simd
      for (int i = 0; i < t.n; ++i)
        sum[i] += Elementwise::loss(base[i] + t.features[i] * w, value[i]);
    }
  }
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < t.n; ++i) total += static_cast<double>(sum[i]);
  return total;
}

template <class Real>
double tile_loss(Loss loss, const Tile<Real>& t) {
  switch (loss) {
    case Loss::squared_error:
      return elementwise_tile<SquaredError>(t);
    case Loss::logistic:
      return elementwise_tile<Logistic>(t);
    case Loss::cross_entropy:
      return cross_entropy_tile(t);
  }
  return NAN;
}

// The tile's features as Real, and the sum of their squares (for the rounding bounds).
template <class Feature, class Real>
const Real* load_tile(const Feature* features, int n, Real* buffer, double* squares) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    buffer[i] = static_cast<Real>(features[i]);
    sum += static_cast<double>(buffer[i]) * static_cast<double>(buffer[i]);
  }
  *squares += sum;
  return buffer;
}

// How far the losses move for the rounding of the outputs: an output is known to at most eight
// epsilon of |base| + |h w| (base, features, weights, shrink and each operation rounded once), and
// the losses are Lipschitz in the outputs. Bounds, not estimates: every step is an inequality.
struct Rounding {
  double weight_sum;  // sum of the weights (over outputs too, where elementwise)
  double weight_largest;
  double base;  // weighted sum of the largest |base| (squared: of base^2)
};

template <class Real>
Rounding rounding_of(const Real* base, const Target<Real>& target, int64_t samples) {
  Rounding r{0, 0, 0};
  const bool per_sample = target.loss == Loss::cross_entropy;
  for (int64_t s = 0; s < samples; ++s) {
    double largest = 0;
    for (int64_t c = 0; c < target.outputs; ++c) {
      const double x = std::fabs(static_cast<double>(base[c * samples + s]));
      if (per_sample) {
        largest = larger(largest, x);
        if (c + 1 < target.outputs) continue;
      } else {
        largest = target.loss == Loss::squared_error ? x * x : x;
      }
      const int64_t at = per_sample ? s : c * samples + s;
      const double weight = target.weight ? static_cast<double>(target.weight[at]) : 1.0;
      r.weight_sum += weight;
      r.weight_largest = larger(r.weight_largest, weight);
      r.base += weight * largest;
    }
  }
  return r;
}

template <class Real>
double rounding_bound(const Rounding& r, const Target<Real>& target, double loss, double squares,
                      const Real* outgoing, double shrink, int64_t samples) {
  double w_largest = 0, w_sum = 0, w_squares = 0;
  for (int64_t c = 0; c < target.outputs; ++c) {
    const double w = std::fabs(shrink * static_cast<double>(outgoing[c]));
    w_largest = larger(w_largest, w);
    w_sum += w;
    w_squares += w * w;
  }
  const double epsilon = static_cast<double>(Format<Real>::epsilon);
  const double largest = r.weight_largest;
  const double underflow = static_cast<double>(Format<Real>::tiny) * 8.0 * r.weight_sum;
  const double sums = 32.0 * loss;  // adding up a tile, weighting, the polynomials' last places
  switch (target.loss) {
    case Loss::squared_error: {  // |d(x^2)| <= 2 |x| |dx|, then Cauchy-Schwarz
      const double moved = 48.0 * (r.base + largest * w_squares * squares);
      return target.scale *
             (underflow + epsilon * (2.0 * std::sqrt(larger(loss, 0.0) * moved) + sums +
                                     static_cast<double>(target.outputs) * loss));
    }
    case Loss::cross_entropy: {  // 2-Lipschitz in the largest change of an output
      const double h = std::sqrt(squares * static_cast<double>(samples));
      return target.scale *
             (underflow +
              epsilon * (16.0 * (r.base + largest * w_largest * h) + 16.0 * r.weight_sum + sums +
                         static_cast<double>(target.outputs) * r.weight_sum));
    }
    case Loss::logistic: {
      const double h = std::sqrt(squares * static_cast<double>(samples));
      return target.scale * (underflow + epsilon * (8.0 * (r.base + largest * w_sum * h) + sums +
                                                    static_cast<double>(target.outputs) * loss));
    }
  }
  return NAN;
}

template <class Feature, class Real>
Status losses_of(double* losses, double* errors, const int64_t* units, int64_t n,
                 const Features& features, const Real* outgoing, double shrink, const Real* base,
                 const Target<Real>& target, const Caller& caller) {
  constexpr int64_t kUnits = 8;  // share a tile of the outputs while it is in L1
  const int64_t samples = features.samples, outputs = target.outputs;
  const Feature* data = static_cast<const Feature*>(features.data);
  const Rounding rounding = errors ? rounding_of(base, target, samples) : Rounding{0, 0, 0};
  const bool finished =
      parallel_blocks(n, kUnits, 8 * samples * outputs, caller, [&](int64_t first, int64_t last) {
        double loss[kUnits] = {0}, squares[kUnits] = {0};
        Real buffer[kTile];
        for (int64_t s = 0; s < samples; s += kTile) {
          Tile<Real> tile = tile_at(s, base, target, samples);
          tile.shrink = static_cast<Real>(shrink);
          for (int64_t i = first; i < last; ++i) {
            const int64_t u = units[i];
            tile.features =
                load_tile(data + u * features.stride + s, tile.n, buffer, &squares[i - first]);
            tile.outgoing = outgoing + u * outputs;
            loss[i - first] += tile_loss(target.loss, tile);
          }
        }
        for (int64_t i = first; i < last; ++i) {
          losses[i] = target.scale * loss[i - first];
          if (errors)
            errors[i] = rounding_bound(rounding, target, loss[i - first], squares[i - first],
                                       outgoing + units[i] * outputs, shrink, samples);
        }
      });
  return finished ? Status::ok : Status::stopped;
}

template <class Feature, class Real>
Status slopes_of(double* slopes, double* errors, const int64_t* units, int64_t n,
                 const Features& features, const Real* outgoing, const Real* gradient,
                 int64_t outputs, const Caller& caller) {
  constexpr int64_t kUnits = 8;
  const int64_t samples = features.samples;
  const Feature* data = static_cast<const Feature*>(features.data);
  double gradient_squares = 0;
  if (errors) {
    for (int64_t i = 0; i < outputs * samples; ++i)
      gradient_squares += static_cast<double>(gradient[i]) * static_cast<double>(gradient[i]);
  }
  const bool finished =
      parallel_blocks(n, kUnits, samples * outputs, caller, [&](int64_t first, int64_t last) {
        double slope[kUnits] = {0}, squares[kUnits] = {0};
        Real buffer[kTile], sum[kTile];
        for (int64_t s = 0; s < samples; s += kTile) {
          const int length = static_cast<int>(samples - s < kTile ? samples - s : kTile);
          for (int64_t i = first; i < last; ++i) {
            const int64_t u = units[i];
            const Real* h =
                load_tile(data + u * features.stride + s, length, buffer, &squares[i - first]);
            for (int r = 0; r < length; ++r) sum[r] = 0;
            for (int64_t c = 0; c < outputs; ++c) {
              const Real w = outgoing[u * outputs + c];
              const Real* g = gradient + c * samples + s;
#pragma omp simd
              for (int r = 0; r < length; ++r) sum[r] += w * g[r];
            }
            double total = 0;
#pragma omp simd reduction(+ : total)
            for (int r = 0; r < length; ++r)
              total += static_cast<double>(h[r]) * static_cast<double>(sum[r]);
            slope[i - first] += total;
          }
        }
        for (int64_t i = first; i < last; ++i) {
          slopes[i] = slope[i - first];
          if (errors) {  // Cauchy-Schwarz over samples and outputs
            double w_squares = 0;
            for (int64_t c = 0; c < outputs; ++c) {
              const double w = static_cast<double>(outgoing[units[i] * outputs + c]);
              w_squares += w * w;
            }
            errors[i] = static_cast<double>(Format<Real>::epsilon) *
                        static_cast<double>(outputs + 8) *
                        std::sqrt(squares[i - first] * w_squares * gradient_squares);
          }
        }
      });
  return finished ? Status::ok : Status::stopped;
}

}  // namespace

// ---------------------------------------------------------------------------------------------

template <class Real>
Status candidate_loss(double* losses, double* errors, const int64_t* units, int64_t n,
                      const Features& features, const Real* outgoing, double shrink,
                      const Real* base, const Target<Real>& target, const Caller& caller) {
  const auto launch =
      features.type == Type::float32 ? losses_of<float, Real> : losses_of<double, Real>;
  return launch(losses, errors, units, n, features, outgoing, shrink, base, target, caller);
}

template <class Real>
Status candidate_slope(double* slopes, double* errors, const int64_t* units, int64_t n,
                       const Features& features, const Real* outgoing, const Real* gradient,
                       int64_t outputs, const Caller& caller) {
  const auto launch =
      features.type == Type::float32 ? slopes_of<float, Real> : slopes_of<double, Real>;
  return launch(slopes, errors, units, n, features, outgoing, gradient, outputs, caller);
}

template <class Real>
Status outputs_loss(double* loss, const Real* outputs, const Target<Real>& target, int64_t samples,
                    const Caller& caller) {
  constexpr int64_t kPieces = 64;  // fixed, so that the sum's order is
  const int64_t tiles = (samples + kTile - 1) / kTile;
  const int64_t piece = kTile * ((tiles + kPieces - 1) / kPieces);
  double part[kPieces] = {0};
  const Real zeros[kTile] = {0};
  const bool finished =
      parallel_blocks(samples, piece, 8 * target.outputs, caller, [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; s += kTile) {
          Tile<Real> tile = tile_at(s, outputs, target, samples);
          tile.features = zeros;    // no candidate:
          tile.outgoing = outputs;  // any C numbers, times zero
          part[first / piece] += tile_loss(target.loss, tile);
        }
      });
  *loss = 0;
  for (int64_t i = 0; i < kPieces; ++i) *loss += target.scale * part[i];
  return finished ? Status::ok : Status::stopped;
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

template Status outputs_loss<double>(double*, const double*, const Target<double>&, int64_t,
                                     const Caller&);
template void outputs_gradient<double>(double*, const Target<double>&, int64_t, const Caller&);
template Status candidate_loss<float>(double*, double*, const int64_t*, int64_t, const Features&,
                                      const float*, double, const float*, const Target<float>&,
                                      const Caller&);
template Status candidate_loss<double>(double*, double*, const int64_t*, int64_t, const Features&,
                                       const double*, double, const double*, const Target<double>&,
                                       const Caller&);
template Status candidate_slope<float>(double*, double*, const int64_t*, int64_t, const Features&,
                                       const float*, const float*, int64_t, const Caller&);
template Status candidate_slope<double>(double*, double*, const int64_t*, int64_t, const Features&,
                                        const double*, const double*, int64_t, const Caller&);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
