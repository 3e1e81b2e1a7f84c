// The loss of every candidate unit: losses[j] = L(base + shrink * phi_j), phi_j = h_j w_j.
//
// Scoring N candidates on m samples with C outputs takes m N C exponentials, which should take most
// of the time. No array of size (N, m, C) is ever stored. A group of candidates shares the loaded
// numbers: for one vector of samples, their outputs are formed one after the other in registers
// (one multiply-add each) and reduced at once. Logarithms are few, because a sum of logarithms is
// the logarithm of a product. Exponentials and logarithms are to base 2 inside, so the features are
// multiplied by log2(e).
//
// Sums of up to about a hundred numbers are in Real, all others in float64. Their order is fixed,
// so that the result does not depend on the number of threads.
#include "candidate_loss.h"

#include <cmath>

#include "../loss.h"
#include "groups.h"
#include "rounding.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

// A sum of logarithms, lane by lane, as the logarithm of a product.
template <class Real>
struct LogProduct {
  using Vector = typename Lanes<Real>::Vector;
  Vector mantissa = Vector{} + Real(1);
  typename Number<Vector>::Bits exponent = {};

  // For normal x > 0; the mantissa stays between sqrt(1/2)^n and sqrt(2)^n in n calls.
  GREEDYPRUNE_INLINE void multiply(Vector x) {
    typename Number<Vector>::Bits n;
    mantissa *= split_exponent(x, &n);
    exponent += n;
  }
  GREEDYPRUNE_INLINE void settle() {
    const Vector x = mantissa;
    mantissa = Vector{} + Real(1);
    multiply(x);
  }
  double log() const { return sum_of(log_normal(mantissa)) + kLn2 * sum_of(exponent); }
};

// A group of candidates, and the sums of their losses so far.
template <int kCount, class Feature, class Real>
struct LossGroup {
  using Vector = typename Lanes<Real>::Vector;
  using Wide = typename Lanes<Real>::Wide;
  const Feature* features[kCount];  // (m) each; null: no candidate
  const Real* outgoing[kCount];     // (C) each
  Vector row[kCount];               // the same in a register, if it has C lanes
  Vector earlier[kCount] = {};      // terms of an unfinished sum over many outputs
  Vector recent[kCount] = {};
  Wide total[kCount] = {};
  LogProduct<Real> logs[kCount];
  int64_t terms = 0;  // added to recent and logs since they were settled

  template <bool kWhole>
  GREEDYPRUNE_INLINE Vector features_at(int u, int64_t s, int64_t n) const {
    if (kCount == 1 && !features[u]) return Vector{};
    return load_lanes<Vector, kWhole>(features[u] + s, n);
  }

  void settle() {
    for (int u = 0; u < kCount; ++u) {
      total[u] += __builtin_convertvector(recent[u], Wide);
      recent[u] = Vector{};
      logs[u].settle();
    }
    terms = 0;
  }
};

// The samples and the loss that the candidates are scored on.
template <class Real>
struct Problem {
  const Real* base;  // (C, m)
  const Target<Real>& target;
  int64_t samples;
  Real unit;   // log2(e) for losses with exponentials, else 1
  Real scale;  // shrink * unit
};

// of_label[u] = w_u[label] at n samples.
template <bool kWhole, int kCount, class Feature, class Real>
GREEDYPRUNE_INLINE void outgoing_of_labels(typename Lanes<Real>::Vector* of_label,
                                           const LossGroup<kCount, Feature, Real>& g,
                                           const int32_t* label, int64_t outputs, int64_t n) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int lanes = Lanes<Real>::count;
#ifndef __clang__  // clang has no such shuffle
  if constexpr (kWhole && sizeof(Real) == sizeof(int32_t) && lanes >= 8) {
    if (outputs <= lanes) {
      typename Number<Vector>::Bits at;
      memcpy(&at, label, sizeof at);
      for (int u = 0; u < kCount; ++u) of_label[u] = __builtin_shuffle(g.row[u], at);
      return;
    }
  }
#endif
  for (int u = 0; u < kCount; ++u) {
    Vector w = {};
    for (int64_t i = 0; i < (kWhole ? lanes : n); ++i) w[i] = g.outgoing[u][label[i]];
    of_label[u] = w;
  }
}

// Adds log(sum of exp(x_c)) - x_label at samples [first, last), x = base + shrink h w, without the
// label's base, which is the same for all candidates (labels_share). kFar: a candidate can move an
// output further than ExponentRange allows, so that its own highest output has to be found.
template <bool kFar, bool kWhole, int kCount, class Feature, class Real>
void add_cross_entropy(LossGroup<kCount, Feature, Real>& g, const Problem<Real>& p, int64_t first,
                       int64_t last) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int lanes = Lanes<Real>::count;
  const int64_t outputs = p.target.outputs;
  for (int64_t s = first; s < last; s += lanes) {
    const int64_t n = last - s;
    Vector h[kCount], sum[kCount] = {}, highest[kCount] = {};
    for (int u = 0; u < kCount; ++u) h[u] = g.template features_at<kWhole>(u, s, n) * p.scale;
    if (kFar) {
      for (int u = 0; u < kCount; ++u) highest[u] -= static_cast<Real>(HUGE_VALF);
      for (int64_t c = 0; c < outputs; ++c) {
        const Vector base = load_lanes<Vector, kWhole>(p.base + c * p.samples + s, n) * p.unit;
        for (int u = 0; u < kCount; ++u) {
          const Vector x = h[u] * g.outgoing[u][c] + base;
          highest[u] = x > highest[u] ? x : highest[u];
        }
      }
    }
    for (int64_t from = 0; from < outputs; from += kTerms) {
      for (int u = 0; from > 0 && u < kCount; ++u) {
        g.earlier[u] += sum[u];
        sum[u] = Vector{};
      }
      const int64_t to = from + kTerms < outputs ? from + kTerms : outputs;
      for (int64_t c = from; c < to; ++c) {
        Vector base = load_lanes<Vector, kWhole>(p.base + c * p.samples + s, n) * p.unit;
        if (!kFar) base = at_least(base, ExponentRange<Real>::floor);
        for (int u = 0; u < kCount; ++u) {
          Vector x = h[u] * g.outgoing[u][c] + base;
          if (kFar) x = at_least(x - highest[u], Number<Vector>::lowest_exponent);
          sum[u] += exp2_normal(x);
        }
      }
    }
    for (int u = 0; outputs > kTerms && u < kCount; ++u) {
      sum[u] += g.earlier[u];
      g.earlier[u] = Vector{};
    }

    Vector of_label[kCount];
    outgoing_of_labels<kWhole>(of_label, g, p.target.label + s, outputs, n);
    for (int u = 0; u < kCount; ++u) of_label[u] *= h[u];
    if (p.target.weight) {
      const Vector weight = load_lanes<Vector, kWhole>(p.target.weight + s, n);
      for (int u = 0; u < kCount; ++u)
        g.recent[u] += weight * (log_normal(sum[u]) * p.unit + highest[u] - of_label[u]);
      continue;
    }
    const Vector inside = kWhole ? Vector{} + Real(1) : ones<Vector>(n);
    for (int u = 0; u < kCount; ++u) {
      if (kFar)
        g.recent[u] += (highest[u] - of_label[u]) * inside;
      else
        g.recent[u] -= of_label[u];
      g.logs[u].mantissa *= kWhole ? sum[u] : sum[u] * inside + (Real(1) - inside);
    }
    if (((s - first) / lanes) % 2 != 0)  // a product of two sums is within the range of exponents
      for (int u = 0; u < kCount; ++u) g.logs[u].settle();
  }
}

// Adds an elementwise loss at samples [first, last), summed over the outputs.
template <Loss kLoss, bool kWeighted, bool kWhole, int kCount, class Feature, class Real>
void add_elementwise(LossGroup<kCount, Feature, Real>& g, const Problem<Real>& p, int64_t first,
                     int64_t last) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int lanes = Lanes<Real>::count;
  const int64_t outputs = p.target.outputs;
  for (int64_t s = first; s < last; s += lanes) {
    const int64_t n = last - s;
    const Vector inside = kWhole ? Vector{} + Real(1) : ones<Vector>(n);
    Vector h[kCount];
    for (int u = 0; u < kCount; ++u) h[u] = g.template features_at<kWhole>(u, s, n) * p.scale;
    for (int64_t from = 0; from < outputs; from += kTerms) {
      const int64_t to = from + kTerms < outputs ? from + kTerms : outputs;
      if (g.terms + to - from > 2 * kTerms) g.settle();
      g.terms += to - from;
      Vector recent[kCount], product[kCount];
      for (int u = 0; u < kCount; ++u) {
        recent[u] = g.recent[u];
        product[u] = g.logs[u].mantissa;
      }
      for (int64_t c = from; c < to; ++c) {
        const int64_t at = c * p.samples + s;
        const Vector base = load_lanes<Vector, kWhole>(p.base + at, n) * p.unit;
        Vector weight = {}, y = {};
        if (kWeighted) weight = load_lanes<Vector, kWhole>(p.target.weight + at, n);
        if (kLoss == Loss::logistic) y = load_lanes<Vector, kWhole>(p.target.value + at, n);
        for (int u = 0; u < kCount; ++u) {
          const Vector x = h[u] * g.outgoing[u][c] + base;
          if (kLoss == Loss::squared_error) {
            recent[u] += kWeighted ? weight * x * x : x * x;
          } else {  // log(1 + e^x) - x y = max(x, 0) - x y + log(1 + e^-|x|)
            Vector loss = positive_part(x) - x * y;
            const Vector e =
                exp2_normal(at_least(minus_magnitude(x), Number<Vector>::lowest_exponent));
            if (kWeighted)
              loss = weight * (loss + log1p_unit(e) * p.unit);
            else
              product[u] += product[u] * (kWhole ? e : e * inside);
            recent[u] += loss;
          }
        }
      }
      for (int u = 0; u < kCount; ++u) {
        g.recent[u] = recent[u];
        g.logs[u].mantissa = product[u];
      }
    }
  }
}

// Adds the loss at samples [first, last). far: as kFar above.
template <bool kWhole, int kCount, class Feature, class Real>
void add_samples(LossGroup<kCount, Feature, Real>& g, const Problem<Real>& p, bool far,
                 int64_t first, int64_t last) {
  switch (p.target.loss) {
    case Loss::squared_error:
      if (p.target.weight)
        return add_elementwise<Loss::squared_error, true, kWhole>(g, p, first, last);
      return add_elementwise<Loss::squared_error, false, kWhole>(g, p, first, last);
    case Loss::logistic:
      if (p.target.weight) return add_elementwise<Loss::logistic, true, kWhole>(g, p, first, last);
      return add_elementwise<Loss::logistic, false, kWhole>(g, p, first, last);
    case Loss::cross_entropy:
      if (far) return add_cross_entropy<true, kWhole>(g, p, first, last);
      return add_cross_entropy<false, kWhole>(g, p, first, last);
  }
}

// losses[u] = the sum over samples [first, last) for candidate u of the group. The magnitude of its
// features is at most largest[u].
template <int kCount, class Feature, class Real>
void sum_losses(double* losses, LossGroup<kCount, Feature, Real>& g, const Problem<Real>& p,
                const double* largest, int64_t first, int64_t last) {
  constexpr int64_t lanes = Lanes<Real>::count;
  const int64_t outputs = p.target.outputs;
  bool far = false;
  for (int u = 0; u < kCount; ++u) {
    Real w = 0;
    for (int64_t c = 0; c < outputs; ++c) w = larger(w, std::fabs(g.outgoing[u][c]));
    const double reach = largest[u] * static_cast<double>(std::fabs(p.scale) * w);
    if (!(reach <= static_cast<double>(ExponentRange<Real>::reach))) far = true;
    g.row[u] = load_lanes<typename Lanes<Real>::Vector, false>(g.outgoing[u],
                                                               outputs < lanes ? outputs : lanes);
  }
  for (int64_t s = first; s < last; s += kTile) {
    const int64_t end = s + kTile < last ? s + kTile : last;
    const int64_t whole = end - (end - s) % lanes;
    add_samples<true>(g, p, far, s, whole);
    if (whole < end) add_samples<false>(g, p, far, whole, end);
    g.settle();
  }
  for (int u = 0; u < kCount; ++u)
    losses[u] = sum_of(g.total[u]) / static_cast<double>(p.unit) + g.logs[u].log();
}

// The weighted sum of base at the labels of samples [first, last), which no candidate changes.
template <class Real>
double labels_share(const Real* base, const Target<Real>& target, int64_t samples, int64_t first,
                    int64_t last) {
  if (target.loss != Loss::cross_entropy) return 0;
  double sum = 0;
  for (int64_t s = first; s < last; ++s)
    sum += static_cast<double>(base[target.label[s] * samples + s]) *
           (target.weight ? static_cast<double>(target.weight[s]) : 1.0);
  return sum;
}

template <class Real>
Problem<Real> problem_of(const Real* base, const Target<Real>& target, int64_t samples,
                         double shrink) {
  const double unit = target.loss == Loss::squared_error ? 1 : kLog2E;
  return {base, target, samples, static_cast<Real>(unit), static_cast<Real>(shrink * unit)};
}

template <class Feature, class Real>
Status losses_of(double* losses, double* errors, const int64_t* units, int64_t n,
                 const Features& features, const Real* outgoing, double shrink, const Real* base,
                 const Target<Real>& target, const Caller& caller) {
  const int64_t samples = features.samples, outputs = target.outputs;
  const Problem<Real> problem = problem_of(base, target, samples, shrink);
  const double share = labels_share(base, target, samples, 0, samples);
  const Rounding rounding = errors ? rounding_of(base, target, samples) : Rounding{0, 0, 0};
  const auto score = [&](auto size, int64_t first) {
    constexpr int count = decltype(size)::value;
    LossGroup<count, Feature, Real> group;
    point_at<count>(group.features, group.outgoing, units + first, features, outgoing, outputs);
    double sums[count], largest[count];
    for (int u = 0; u < count; ++u) largest[u] = features.largest[units[first + u]];
    sum_losses(sums, group, problem, largest, 0, samples);
    for (int u = 0; u < count; ++u) {
      losses[first + u] = target.scale * (sums[u] - share);
      if (!errors) continue;
      const double most = largest[u] * largest[u] * static_cast<double>(samples);
      const double squares = features.squares[units[first + u]];
      errors[first + u] =
          rounding_bound(rounding, target, sums[u] - share, squares < most ? squares : most,
                         group.outgoing[u], shrink, samples);
    }
  };
  return in_groups(n, 4 * samples * outputs, caller, score) ? Status::ok : Status::stopped;
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
Status outputs_loss(double* loss, const Real* outputs, const Target<Real>& target, int64_t samples,
                    const Caller& caller) {
  constexpr int64_t kPieces = 64;  // a fixed number, so that the order of the sum is fixed
  const int64_t tiles = (samples + kTile - 1) / kTile;
  const int64_t piece = kTile * (tiles > kPieces ? (tiles + kPieces - 1) / kPieces : 1);
  const Problem<Real> problem = problem_of(outputs, target, samples, 0);
  double part[kPieces] = {0};
  const bool finished =
      parallel_blocks(samples, piece, 8 * target.outputs, caller, [&](int64_t first, int64_t last) {
        LossGroup<1, Real, Real> none;
        none.features[0] = nullptr;  // no candidate
        none.outgoing[0] = outputs;  // any C numbers: they are multiplied with zero
        const double largest = 0;
        sum_losses(&part[first / piece], none, problem, &largest, first, last);
        part[first / piece] -= labels_share(outputs, target, samples, first, last);
      });
  *loss = 0;
  for (int64_t i = 0; i < kPieces; ++i) *loss += target.scale * part[i];
  return finished ? Status::ok : Status::stopped;
}

template Status outputs_loss<double>(double*, const double*, const Target<double>&, int64_t,
                                     const Caller&);
template Status candidate_loss<float>(double*, double*, const int64_t*, int64_t, const Features&,
                                      const float*, double, const float*, const Target<float>&,
                                      const Caller&);
template Status candidate_loss<double>(double*, double*, const int64_t*, int64_t, const Features&,
                                       const double*, double, const double*, const Target<double>&,
                                       const Caller&);

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
