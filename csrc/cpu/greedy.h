// The greedy loop, equation (1), for any objective; every greedy_*.cpp runs this one.
//
// An objective knows z, the sum of the phi picked so far, and offers
//   score(k, units, n, scores, errors, everywhere)    the scores that step k minimises over these
//                                         units, with bounds on their rounding errors: on the
//                                         step's mini-batch, if there is one, or (everywhere) on
//                                         all samples. It may drop units that cannot have the
//                                         lowest score, and lowers n then.
//   can_rescore()                         can it score more exactly?
//   rescore(k, units, n, scores, errors)  the same, more exactly
//   add(k, unit)                          z += phi_unit
//   measure(k, loss, gap)                 L(b + z / k), and where gap is not null
//                                         <L'(z / k), z / k> - min_j <L'(z / k), phi_j>
// Each of them but can_rescore returns a Status.
#pragma once

#include <cmath>

#include "../kernels.h"
#include "../loss.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

// z += phi_unit, for sums z (C, m).
template <class Feature>
void add_phi(const Feature* features, const double* outgoing, int64_t outputs, double* sum,
             int64_t samples) {
  for (int64_t c = 0; c < outputs; ++c) {
    for (int64_t s = 0; s < samples; ++s)
      sum[c * samples + s] += outgoing[c] * static_cast<double>(features[s]);
  }
}

inline void add_phi(const Features& f, int64_t unit, const double* outgoing, int64_t outputs,
                    double* sum) {
  const double* w = outgoing + unit * outputs;
  if (f.type == Type::float32)
    add_phi(static_cast<const float*>(f.data) + unit * f.stride, w, outputs, sum, f.samples);
  else
    add_phi(static_cast<const double*>(f.data) + unit * f.stride, w, outputs, sum, f.samples);
}

// Keeps those of units[0:n] whose score may be the lowest, allowing for rounding; returns how many.
inline int64_t keep_contenders(int64_t* units, double* scores, double* errors, int64_t n) {
  double lowest = HUGE_VAL;
  for (int64_t i = 0; i < n; ++i) {
    const double above = scores[i] + errors[i];
    if (above < lowest) lowest = above;
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool overflowed = !std::isfinite(scores[i]) || !std::isfinite(errors[i]);
    if (scores[i] - errors[i] > lowest && !overflowed) continue;
    units[kept] = units[i];
    scores[kept] = scores[i];
    errors[kept] = errors[i];
    ++kept;
  }
  return kept;
}

// Moves the `wanted` units with the lowest scores to the front of units[0:n] (quickselect; ties go
// to the lowest index); returns how many there are.
inline int64_t keep_lowest(int64_t* units, double* scores, int64_t n, int64_t wanted) {
  if (n <= wanted) return n;
  const auto before = [](double a, int64_t i, double b, int64_t j) {
    return a < b || (a == b && i < j);
  };
  int64_t first = 0, last = n - 1;
  while (first < last) {
    const double pivot = scores[(first + last) / 2];
    const int64_t pivot_unit = units[(first + last) / 2];
    int64_t i = first, j = last;
    while (i <= j) {
      while (before(scores[i], units[i], pivot, pivot_unit)) ++i;
      while (before(pivot, pivot_unit, scores[j], units[j])) --j;
      if (i > j) break;
      const double score = scores[i];
      const int64_t unit = units[i];
      scores[i] = scores[j];
      units[i++] = units[j];
      scores[j] = score;
      units[j--] = unit;
    }
    if (wanted - 1 <= j)
      last = j;
    else if (wanted - 1 >= i)
      first = i;
    else
      break;
  }
  return wanted;
}

inline double lowest_of(const double* scores, int64_t n) {
  double lowest = scores[0];
  for (int64_t i = 1; i < n; ++i) lowest = scores[i] < lowest ? scores[i] : lowest;
  return lowest;
}

template <class Objective>
Status greedy(Path& path, Objective& objective, int64_t units, const Rule& rule,
              const Workspace& workspace, const Caller& caller) {
  int64_t* available = workspace.available;
  int64_t left = units, distinct = 0;
  for (int64_t j = 0; j < units; ++j) available[j] = j;
  path.length = 0;
  path.scored = 0;
  path.rescored = 0;
  int64_t* picked = workspace.picked;
  for (int64_t j = 0; j < units; ++j) picked[j] = 0;

  for (int64_t k = 1; k <= rule.steps && distinct < rule.size; ++k) {
    // The units to score: all that may be picked, or `candidates` of them drawn at random, which
    // the first steps of a Fisher-Yates shuffle move to the front.
    int64_t n = left;
    if (rule.candidates) {
      n = rule.candidates < left ? rule.candidates : left;
      const double* draw = rule.draws + (k - 1) * rule.candidates;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t other = i + static_cast<int64_t>(draw[i] * static_cast<double>(left - i));
        const int64_t unit = available[i];
        available[i] = available[other];
        available[other] = unit;
      }
    }
    int64_t* contenders = workspace.contenders;
    for (int64_t i = 0; i < n; ++i) contenders[i] = available[i];

    Status status = objective.score(k, contenders, n, workspace.scores, workspace.errors, false);
    path.scored += n;
    if (status == Status::ok && rule.shortlist) {
      n = keep_lowest(contenders, workspace.scores, n, rule.shortlist);
      status = objective.score(k, contenders, n, workspace.scores, workspace.errors, true);
    }
    if (status != Status::ok) return status;
    n = keep_contenders(contenders, workspace.scores, workspace.errors, n);
    if (n > 1 && objective.can_rescore()) {
      status = objective.rescore(k, contenders, n, workspace.scores, workspace.errors);
      if (status != Status::ok) return status;
      path.rescored += n;
      n = keep_contenders(contenders, workspace.scores, workspace.errors, n);
    }
    int64_t unit = contenders[0];  // rounding cannot tell these apart: the lowest index
    for (int64_t i = 1; i < n; ++i) unit = contenders[i] < unit ? contenders[i] : unit;

    double* gap = path.gap ? path.gap + (k - 1) : nullptr;
    status = objective.add(k, unit);
    if (status == Status::ok) status = objective.measure(k, path.losses + (k - 1), gap);
    if (status != Status::ok) return status;
    path.order[k - 1] = unit;
    path.length = k;

    if (!picked[unit]) ++distinct;
    picked[unit] = 1;
    if (!rule.replacement) {
      int64_t place = 0;
      while (available[place] != unit) ++place;
      available[place] = available[--left];
    }
    if (caller.step && caller.step(caller.self, k, unit, path.losses[k - 1])) break;
    if (!left) break;
  }
  return Status::ok;
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
