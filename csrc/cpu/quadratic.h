// The objective of greedy_gram and greedy_columns: squared error through sums over the samples,
//
//   argmin of (1)  =  argmin_j  G_jj / 2 + c_j - k beta_j,      c += G[:, i_k] after each step (2)
//   L_k = ( |t|^2 - (2/k) sum_S beta_i + (1/k^2) sum_S c_i ) / (m C)
//
// `Columns` gives the rows of G: const double* column(unit, k), or null where the caller could not
// fetch one. Columns that come from float32 products may be off by `rounding` |phi_i| |phi_j|.
// Candidates that this error leaves undecided are scored from the features: <phi_j, z - k t> is one
// pass over h_j.
#pragma once

#include <cmath>

#include "../rounding.h"
#include "candidate_slope.h"
#include "greedy.h"
#include "over_ranks.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

template <class Columns>
class QuadraticObjective {
 public:
  QuadraticObjective(const Quadratic& q, Columns& columns, const Workspace& workspace,
                     const Caller& caller)
      : q_(q), columns_(columns), workspace_(workspace), caller_(caller) {}

  Status score(int64_t k, const int64_t* units, int64_t n, double* scores, double* errors, bool) {
    score_from_columns(k, units, n, scores, errors);
    return Status::ok;
  }

  bool can_rescore() const { return q_.features != nullptr; }

  Status rescore(int64_t k, const int64_t* units, int64_t n, double* scores, double* errors) {
    bool refreshed = false;
    Status status = refresh_if_worth(n, &refreshed);
    if (status != Status::ok) return status;
    if (refreshed) {
      score_from_columns(k, units, n, scores, errors);
      return Status::ok;
    }
    const double steps = static_cast<double>(k);
    for (int64_t i = 0; i < q_.outputs * samples(); ++i)
      q_.residual[i] = q_.sum[i] - steps * q_.target[i];
    status = candidate_slope<double>(scores, errors, units, n, *q_.features, q_.outgoing,
                                     q_.residual, q_.outputs, caller_);
    widen(errors, scores, n, workspace_);
    if (status == Status::ok)
      status = add_up({{scores, n}, {errors, n}}, picks_, workspace_, caller_);
    for (int64_t i = 0; i < n; ++i) scores[i] += 0.5 * q_.gram_diagonal[units[i]];
    return status;
  }

  Status add(int64_t k, int64_t unit) {
    const double* column = columns_.column(unit, k);
    if (!column) return Status::stopped;
    picks_ = after_pick(picks_, unit);
    beta_sum_ += q_.beta[unit];
    state_sum_ += 2 * q_.state[unit] + q_.gram_diagonal[unit];
    uncertain_ += q_.phi_norm[unit];
    phi_norm_sum_ += q_.phi_norm[unit];
    for (int64_t j = 0; j < q_.units; ++j) q_.state[j] += column[j];
    if (q_.features) add_phi(*q_.features, unit, q_.outgoing, q_.outputs, q_.sum);
    return Status::ok;
  }

  Status measure(int64_t k, double* loss, double* gap) {
    const double shrink = 1 / static_cast<double>(k);
    double total = q_.target_norm - 2 * shrink * beta_sum_ + shrink * shrink * state_sum_;
    double along = shrink * shrink * state_sum_ - shrink * beta_sum_;  // <z/k - t, z/k>
    int64_t* units = workspace_.contenders;  // free between two steps, like scores and errors
    int64_t n = gap ? slopes_from_columns(shrink, units) : 0;
    if (q_.features) {
      bool refreshed = false;
      Status status = gap ? refresh_if_worth(n, &refreshed) : Status::ok;
      if (status != Status::ok) return status;
      if (refreshed) n = slopes_from_columns(shrink, units);
      total = 0;
      along = 0;
      for (int64_t i = 0; i < q_.outputs * samples(); ++i) {
        q_.residual[i] = shrink * q_.sum[i] - q_.target[i];
        total += q_.residual[i] * q_.residual[i];
        along += q_.residual[i] * shrink * q_.sum[i];
      }
      if (gap)
        status = candidate_slope<double>(workspace_.scores, nullptr, units, n, *q_.features,
                                         q_.outgoing, q_.residual, q_.outputs, caller_);
      if (status == Status::ok)
        status =
            add_up({{&total, 1}, {&along, 1}, {workspace_.scores, n}}, picks_, workspace_, caller_);
      if (status != Status::ok) return status;
    }
    *loss = q_.scale * total;
    if (gap) *gap = 2 * q_.scale * (along - lowest_of(workspace_.scores, n));
    return Status::ok;
  }

 private:
  int64_t samples() const { return q_.features->samples; }

  void score_from_columns(int64_t k, const int64_t* units, int64_t n, double* scores,
                          double* errors) const {
    const double steps = static_cast<double>(k);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = units[i];
      scores[i] = 0.5 * q_.gram_diagonal[j] + q_.state[j] - steps * q_.beta[j];
      errors[i] = error_of(j, steps);
    }
  }

  // <z/k - t, phi_j> of every unit that rounding does not rule out as the lowest; returns how many
  // there are.
  int64_t slopes_from_columns(double shrink, int64_t* units) const {
    for (int64_t j = 0; j < q_.units; ++j) {
      units[j] = j;
      workspace_.scores[j] = shrink * q_.state[j] - q_.beta[j];
      workspace_.errors[j] = shrink * error_of(j, 1 / shrink);
    }
    return keep_contenders(units, workspace_.scores, workspace_.errors, q_.units);
  }

  // Rounding errors grow with every column. When scoring units again has cost as much as a pass
  // over all features (a unit counts four times), that pass is made: then c is exact again, and few
  // units are in doubt.
  Status refresh_if_worth(int64_t doubtful, bool* refreshed) {
    doubtful_ += doubtful;
    if (4 * doubtful_ < q_.units || doubtful < 2) return Status::ok;
    doubtful_ = 0;
    uncertain_ = 0;
    *refreshed = true;
    const Status status =
        candidate_slope<double>(q_.state, nullptr, q_.all_units, q_.units, *q_.features,
                                q_.outgoing, q_.sum, q_.outputs, caller_);
    return status == Status::ok ? add_up({{q_.state, q_.units}}, picks_, workspace_, caller_)
                                : status;
  }

  double error_of(int64_t j, double steps) const {
    return quadratic_error(q_.rounding, q_.phi_norm[j], uncertain_, phi_norm_sum_, steps,
                           q_.beta[j], workspace_.ranks);
  }

  const Quadratic& q_;
  Columns& columns_;
  const Workspace& workspace_;
  const Caller& caller_;
  double beta_sum_ = 0, state_sum_ = 0;  // sums over the picks of beta and c
  double phi_norm_sum_ = 0;              // sum over the picks of |phi_i|
  double uncertain_ = 0;                 // the same over the picks since c was last exact
  uint32_t picks_ = 0;
  int64_t doubtful_ = 0;  // units scored again from the features since c was last exact
};

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
