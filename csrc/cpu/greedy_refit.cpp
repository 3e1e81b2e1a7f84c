// Least squares, refitted in every step: each step picks the unit that lowers the error most when
// the outgoing weights of all picked units are solved for again.
//
// Each consumer is a part, with least squares of its own on the same units; their errors add up.
// In a part x_i are the features, `width` of them a unit, and K_ij = <x_i, x_j>. L is the Cholesky
// factor of K on the picked units S, and r_j = <x_j, t - fit>. Unit j lowers |t - fit|^2 by
//
//     gain_j = tr( r_j^T s_j^-1 r_j ),    s_j = K_jj - L_j L_j^T,    L_j = K_jS L_S^-T
//
// and when it is picked, r_i -= L_ij g with g = s_j^-1/2 r_j for all other units i. A column of L
// is formed when its unit is picked, so a step costs O(N) dot products of length k in each part.
#include <cmath>

#include "greedy.h"
#include "greedy_kernels.h"
#include "lanes.h"
#include "parallel.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

using Vector = Lanes<double>::Vector;
constexpr int64_t kLanes = Lanes<double>::count;

double dot(const double* a, const double* b, int64_t n) {
  Vector sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int64_t v = 0; v < 4; ++v) {
      const int64_t at = i + v * kLanes;
      sum[v] += load_lanes<Vector, true>(a + at, kLanes) * load_lanes<Vector, true>(b + at, kLanes);
    }
  }
  double rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

class Part {
 public:
  Part(const LeastSquares& p, const Refit& refit) : p_(p), units_(refit.units), most_(refit.most) {}

  // About the multiply-adds for one unit, after `before` picked features.
  int64_t work(int64_t before) const { return width() * width() * (before + outputs()); }

  int64_t width() const { return p_.width; }

  void start(int64_t j) const {
    for (int64_t a = 0; a < width(); ++a)
      for (int64_t b = 0; b < width(); ++b) block(p_.rest, j)[a * width() + b] = gram(j, a, j, b);
  }

  // The unit's rows of the factor and of `solved`, after `before` picked features.
  void pick(int64_t unit, int64_t before) const {
    const int64_t w = width();
    const double* root = block(p_.root, unit);  // s^1/2
    for (int64_t a = 0; a < w; ++a) {
      for (int64_t b = 0; b < w; ++b) row(unit, a)[before + b] = b <= a ? root[a * w + b] : 0;
      double* solved = p_.solved + (before + a) * outputs();
      for (int64_t c = 0; c < outputs(); ++c) solved[c] = right(unit, a)[c];
      for (int64_t b = 0; b < a; ++b) {
        const double* earlier = p_.solved + (before + b) * outputs();
        for (int64_t c = 0; c < outputs(); ++c) solved[c] -= root[a * w + b] * earlier[c];
      }
      for (int64_t c = 0; c < outputs(); ++c) solved[c] *= inverse(root[a * w + a]);
    }
  }

  // What the pick of `unit`, after `before` picked features, leaves of unit j.
  void subtract(int64_t j, int64_t unit, int64_t before) const {
    const int64_t w = width();
    const double* root = block(p_.root, unit);
    for (int64_t a = 0; a < w; ++a) {
      double* added = row(j, a) + before;  // K_jp - L_j L_p^T, then divided by the root
      for (int64_t b = 0; b < w; ++b) {
        added[b] = gram(j, a, unit, b) - dot(row(j, a), row(unit, b), before);
        for (int64_t c = 0; c < b; ++c) added[b] -= added[c] * root[b * w + c];
        added[b] *= inverse(root[b * w + b]);
      }
      for (int64_t b = 0; b < w; ++b) {
        const double* solved = p_.solved + (before + b) * outputs();
        for (int64_t c = 0; c < outputs(); ++c) right(j, a)[c] -= added[b] * solved[c];
      }
    }
    for (int64_t a = 0; a < w; ++a)
      for (int64_t b = 0; b <= a; ++b)
        block(p_.rest, j)[a * w + b] -= dot(row(j, a) + before, row(j, b) + before, w);
  }

  // |root^-1 r_j|^2, with root = s_j^1/2, a Cholesky factor.
  double gain(int64_t j) const {
    const int64_t w = width();
    const double* rest = block(p_.rest, j);
    double* root = block(p_.root, j);
    for (int64_t a = 0; a < w; ++a) {
      for (int64_t b = 0; b <= a; ++b) {
        const double left = rest[a * w + b] - dot(root + a * w, root + b * w, b);
        if (b < a)
          root[a * w + b] = left * inverse(root[b * w + b]);
        else
          root[a * w + a] = left > kDependent * gram(j, a, j, a) ? std::sqrt(left) : 0;
      }
    }
    Vector total = {}, y[kMostWidth];
    for (int64_t c = 0; c < outputs(); c += kLanes) {
      for (int64_t a = 0; a < w; ++a) {
        const double* r = right(j, a) + c;
        y[a] = c + kLanes <= outputs() ? load_lanes<Vector, true>(r, kLanes)
                                       : load_lanes<Vector, false>(r, outputs() - c);
        for (int64_t b = 0; b < a; ++b) y[a] -= root[a * w + b] * y[b];
        y[a] *= inverse(root[a * w + a]);
        total += y[a] * y[a];
      }
    }
    return sum_of(total);
  }

 private:
  int64_t outputs() const { return p_.outputs; }
  double* block(double* of, int64_t j) const { return of + j * width() * width(); }
  double* right(int64_t j, int64_t a) const { return p_.right + (j * width() + a) * outputs(); }
  double* row(int64_t j, int64_t a) const {
    return p_.factor + (j * width() + a) * most_ * width();
  }
  double gram(int64_t i, int64_t a, int64_t j, int64_t b) const {
    return p_.gram[(i * width() + a) * units_ * width() + j * width() + b];
  }
  // A dependent feature has a root of 0 and takes no part in the fit.
  static double inverse(double root) { return root > 0 ? 1 / root : 0; }

  const LeastSquares p_;
  const int64_t units_, most_;
};

class RefitObjective {
 public:
  RefitObjective(const Refit& p, const LeastSquares* parts, int64_t count, const Caller& caller)
      : p_(p), parts_(parts), count_(count), caller_(caller) {}

  Status start() {
    for (int64_t j = 0; j < p_.units; ++j) p_.place[j] = -1;
    return each_unit([&](const Part& part, int64_t j) { part.start(j); });
  }

  Status score(int64_t, const int64_t* units, int64_t n, double* scores, double* errors, bool) {
    const double left = p_.target_norm - explained_;
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = p_.scale * (left - p_.gain[units[i]]);
      errors[i] = kRounding * p_.scale * (std::fabs(left) + p_.gain[units[i]]);
    }
    return Status::ok;
  }

  bool can_rescore() const { return false; }
  Status rescore(int64_t, const int64_t*, int64_t, double*, double*) { return Status::ok; }

  Status add(int64_t, int64_t unit) {
    if (p_.place[unit] >= 0) return Status::ok;  // a repeated pick changes no weights
    const int64_t before = picked_;
    p_.place[unit] = picked_++;
    explained_ += p_.gain[unit];
    for (int64_t i = 0; i < count_; ++i) part(i).pick(unit, before * part(i).width());
    return each_unit(
        [&](const Part& part, int64_t j) { part.subtract(j, unit, before * part.width()); });
  }

  Status measure(int64_t, double* loss, double* gap) {
    *loss = p_.scale * (p_.target_norm - explained_);
    if (gap) *gap = NAN;  // the weights are no mixture of the units' dense weights
    return Status::ok;
  }

 private:
  // Relative rounding error of the sums in float64: it allows for some thousand roundings of 2^-53.
  static constexpr double kRounding = 1e-12;

  Part part(int64_t i) const { return Part(parts_[i], p_); }

  // Changes all parts by `change(part, unit)` and sums up the gains. A picked unit is left as it
  // is, with a gain of 0.
  template <class Change>
  Status each_unit(const Change& change) {
    int64_t work = 0;
    for (int64_t i = 0; i < count_; ++i) work += part(i).work(picked_ * part(i).width());
    const int64_t block_size = 1 + (1 << 14) * count_ / (1 + work);
    const bool finished =
        parallel_blocks(p_.units, block_size, work, caller_, [&](int64_t first, int64_t last) {
          for (int64_t j = first; j < last; ++j) p_.gain[j] = 0;
          for (int64_t i = 0; i < count_; ++i) {
            const Part each = part(i);
            for (int64_t j = first; j < last; ++j) {
              if (p_.place[j] >= 0) continue;
              change(each, j);
              p_.gain[j] += each.gain(j);
            }
          }
        });
    return finished ? Status::ok : Status::stopped;
  }

  const Refit& p_;
  const LeastSquares* parts_;
  const int64_t count_;
  const Caller& caller_;
  double explained_ = 0;
  int64_t picked_ = 0;
};

}  // namespace

// ---------------------------------------------------------------------------------------------

Status greedy_refit(Path& path, const Refit& refit, const LeastSquares* parts, int64_t count,
                    const Rule& rule, const Workspace& workspace, const Caller& caller) {
  for (int64_t i = 0; i < count; ++i)
    if (parts[i].width > kMostWidth) return Status::bad_argument;
  RefitObjective objective(refit, parts, count, caller);
  const Status status = objective.start();
  if (status != Status::ok) return status;
  return greedy(path, objective, refit.units, rule, workspace, caller);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
