// Any loss of kernels.h, all greedy steps in one call, by scoring the candidates' losses. Also the
// stochastic form: each step scores on a mini-batch of its own, and the reported losses are those
// of all samples.
//
// Candidates are screened in float32, with a rounding bound for each. Those that the bounds cannot
// tell apart are scored again in float64. Where the gap is wanted, its slopes bound every
// candidate's next loss from below (tangent.h), and a candidate whose bound is above the lowest
// loss is not scored at all.
#include <cmath>

#include "../rounding.h"
#include "../tangent.h"
#include "candidate_loss.h"
#include "candidate_slope.h"
#include "greedy.h"
#include "greedy_kernels.h"
#include "over_ranks.h"
#include "parallel.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

class PointwiseObjective {
 public:
  PointwiseObjective(const Pointwise& p, const Workspace& workspace, const Caller& caller)
      : p_(p), workspace_(workspace), caller_(caller) {}

  int64_t units() const { return p_.features.units; }

  // Computes what does not change from step to step.
  Status start() {
    for (int64_t i = 0; i < units() * outputs(); ++i)
      p_.outgoing32[i] = static_cast<float>(p_.outgoing[i]);
    choose_batch(0);
    if (!p_.batch) convert_target();
    gradient_error_ =
        kGradientRoundings * Number<double>::epsilon * weights_norm() * p_.target.scale;
    if (!p_.linear) return Status::ok;
    for (int64_t c = 0; c < outputs(); ++c) {
      for (int64_t s = 0; s < samples(); ++s)
        linear_bias_ += p_.bias[c] * p_.linear[c * samples() + s];
    }
    for (int64_t j = 0; j < units(); ++j) workspace_.contenders[j] = j;
    const Status status =
        candidate_slope<double>(p_.linear_unit, nullptr, workspace_.contenders, units(),
                                p_.features, p_.outgoing, p_.linear, outputs(), caller_);
    return status == Status::ok ? add_up({{p_.linear_unit, units()}, {&linear_bias_, 1}}, picks_,
                                         workspace_, caller_)
                                : status;
  }

  // On the step's mini-batch, if there is one, or (everywhere) on all samples.
  Status score(int64_t k, int64_t* candidates, int64_t& n, double* scores, double* errors,
               bool everywhere) {
    choose_batch(p_.batch && !everywhere ? k : 0);
    if (p_.batch) convert_target();
    outputs_at(k);
    const int64_t size = outputs() * batch_.features.samples;
    for (int64_t i = 0; i < size; ++i) p_.outputs32[i] = static_cast<float>(p_.outputs64[i]);
    return tangent_step_ == k - 1 && k > 1 ? screen_lazily(k, candidates, n, scores, errors)
                                           : screen(k, candidates, n, scores, errors);
  }

  bool can_rescore() const { return true; }

  Status rescore(int64_t k, const int64_t* candidates, int64_t n, double* scores, double* errors) {
    Status status =
        candidate_loss<double>(scores, errors, candidates, n, batch_.features, p_.outgoing,
                               shrink(k), p_.outputs64, without_value(batch_.target), caller_);
    widen(errors, scores, n, workspace_);
    if (status == Status::ok)
      status = add_up({{scores, n}, {errors, n}}, picks_, workspace_, caller_);
    return status == Status::ok ? add_linear(k, candidates, n, scores, errors) : status;
  }

  Status add(int64_t, int64_t unit) {
    picks_ = after_pick(picks_, unit);
    add_phi(p_.features, unit, p_.outgoing, outputs(), p_.sum);
    if (p_.linear) linear_sum_ += p_.linear_unit[unit];
    return Status::ok;
  }

  // Where the gap is wanted, it also leaves the tangent at u = b + z / k for the next step.
  Status measure(int64_t k, double* loss, double* gap) {
    choose_batch(0);
    outputs_at(k);
    Status status =
        outputs_loss<double>(loss, p_.outputs64, without_value(batch_.target), samples(), caller_);
    if (status != Status::ok) return status;
    const double linear = p_.linear ? linear_bias_ + shrink(k) * linear_sum_ : 0;
    if (!gap) {
      status = add_up({{loss, 1}}, picks_, workspace_, caller_);
      *loss += linear;
      return status;
    }
    outputs_gradient<double>(p_.outputs64, without_value(batch_.target), samples(), caller_);
    double along = 0, magnitude = 0;
    for (int64_t i = 0; i < outputs() * samples(); ++i) {
      if (p_.linear) p_.outputs64[i] += p_.linear[i];
      const double term = p_.outputs64[i] * p_.sum[i];
      along += term;
      magnitude += std::fabs(term);
      p_.outputs32[i] = static_cast<float>(p_.outputs64[i]);
    }
    int64_t* candidates = workspace_.contenders;  // free between two steps
    for (int64_t j = 0; j < units(); ++j) candidates[j] = j;
    status = candidate_slope<float>(p_.slopes, p_.slope_errors, candidates, units(), p_.features,
                                    p_.outgoing32, p_.outputs32, outputs(), caller_);
    if (status != Status::ok) return status;
    for (int64_t j = 0; j < units(); ++j) p_.slope_errors[j] += gradient_error_ * phi_norm(j);
    const double terms = static_cast<double>(outputs() * samples());
    double along_error = Number<double>::epsilon * (terms + kTotalRoundings) * magnitude;
    widen(p_.slope_errors, p_.slopes, units(), workspace_);
    widen(&along_error, &along, 1, workspace_);
    status = add_up({{loss, 1},
                     {&along, 1},
                     {&along_error, 1},
                     {p_.slopes, units()},
                     {p_.slope_errors, units()}},
                    picks_, workspace_, caller_);
    if (status != Status::ok) return status;
    *loss += linear;
    for (int64_t j = 0; j < units(); ++j) {
      workspace_.scores[j] = p_.slopes[j];
      workspace_.errors[j] = p_.slope_errors[j];
    }
    const int64_t n = keep_contenders(candidates, workspace_.scores, workspace_.errors, units());
    status = candidate_slope<double>(workspace_.scores, nullptr, candidates, n, p_.features,
                                     p_.outgoing, p_.outputs64, outputs(), caller_);
    if (status == Status::ok)
      status = add_up({{workspace_.scores, n}}, picks_, workspace_, caller_);
    if (status != Status::ok) return status;
    *gap = shrink(k) * along - lowest_of(workspace_.scores, n);
    tangent_ = {*loss, shrink(k) * along,
                Number<double>::epsilon *
                        (kTotalRoundings + static_cast<double>(workspace_.ranks)) *
                        std::fabs(*loss) +
                    shrink(k) * along_error};
    tangent_step_ = k;
    return Status::ok;
  }

 private:
  struct Batch {  // the samples that a step scores on: its mini-batch, or all
    Features features;
    Target<double> target;
    int64_t first;
  };

  // The norm of the loss's weights over samples and outputs.
  double weights_norm() const {
    const int64_t repeats = weight_per_sample() ? outputs() : 1,
                  n = outputs() * samples() / repeats;
    double squares = p_.target.weight ? 0 : static_cast<double>(n);
    for (int64_t i = 0; p_.target.weight && i < n; ++i)
      squares += p_.target.weight[i] * p_.target.weight[i];
    return std::sqrt(squares * static_cast<double>(repeats));
  }

  // An upper bound of |phi_j|.
  double phi_norm(int64_t j) const {
    const double* w = p_.outgoing + j * outputs();
    double w_squares = 0;
    for (int64_t c = 0; c < outputs(); ++c) w_squares += w[c] * w[c];
    return std::sqrt(p_.features.squares[j] * w_squares);
  }

  int64_t outputs() const { return p_.target.outputs; }
  int64_t samples() const { return p_.features.samples; }
  static double shrink(int64_t k) { return 1 / static_cast<double>(k); }

  bool weight_per_sample() const { return p_.target.loss == Loss::cross_entropy; }

  Target<double> without_value(Target<double> target) const {
    if (target.loss == Loss::squared_error) target.value = nullptr;  // subtracted in outputs_at
    return target;
  }

  Target<float> target32() const {
    const Target<double>& t = batch_.target;
    return {t.loss,
            outputs(),
            t.loss == Loss::logistic ? p_.value32 : nullptr,
            t.label,
            t.weight ? p_.weight32 : nullptr,
            t.scale};
  }

  void convert_target() {
    const Target<double>& target = batch_.target;
    const int64_t m = batch_.features.samples;
    if (target.weight) {
      const int64_t size = weight_per_sample() ? m : outputs() * m;
      for (int64_t i = 0; i < size; ++i) p_.weight32[i] = static_cast<float>(target.weight[i]);
    }
    if (target.loss == Loss::logistic) {
      for (int64_t i = 0; i < outputs() * m; ++i)
        p_.value32[i] = static_cast<float>(target.value[i]);
    }
  }

  // The losses of b + (z + phi_j) / k.
  Status screen(int64_t k, const int64_t* candidates, int64_t n, double* scores, double* errors) {
    Status status =
        candidate_loss<float>(scores, errors, candidates, n, batch_.features, p_.outgoing32,
                              shrink(k), p_.outputs32, target32(), caller_);
    widen(errors, scores, n, workspace_);
    if (status == Status::ok)
      status = add_up({{scores, n}, {errors, n}}, picks_, workspace_, caller_);
    return status == Status::ok ? add_linear(k, candidates, n, scores, errors) : status;
  }

  // The same for candidates in the order of their tangent bounds, until a bound is above the lowest
  // loss so far. The candidates left cannot have the lowest loss and are dropped.
  Status screen_lazily(int64_t k, int64_t* candidates, int64_t& n, double* scores, double* errors) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = candidates[i];
      scores[i] = tangent_bound(tangent_, p_.slopes[j], shrink(k),
                                [&] { return shrink(k) * p_.slope_errors[j]; });
    }
    double lowest = HUGE_VAL;
    int64_t scored = 0;
    bool possible = true;
    for (int64_t block = kScoredFirst; possible && scored < n; block *= 2) {
      const int64_t last =
          scored + keep_lowest(candidates + scored, scores + scored, n - scored, block);
      int64_t end = scored;
      for (int64_t i = scored; i < last; ++i)
        if (scores[i] <= lowest) candidates[end++] = candidates[i];
      possible = end == last;
      const Status status =
          screen(k, candidates + scored, end - scored, scores + scored, errors + scored);
      if (status != Status::ok) return status;
      for (; scored < end; ++scored) lowest = std::fmin(lowest, scores[scored] + errors[scored]);
    }
    n = scored;
    return Status::ok;
  }

  // outputs64 = b + z / k at the batch's samples, less the target for squared error, less each
  // sample's highest output for cross-entropy (so that no exponential overflows).
  void outputs_at(int64_t k) {
    const int64_t m = batch_.features.samples;
    const Target<double>& target = batch_.target;
    const double scale = shrink(k);
    for (int64_t c = 0; c < outputs(); ++c) {
      const double* sum = p_.sum + c * samples() + batch_.first;
      double* out = p_.outputs64 + c * m;
      for (int64_t s = 0; s < m; ++s) out[s] = p_.bias[c] + scale * sum[s];
      if (target.loss == Loss::squared_error) {
        for (int64_t s = 0; s < m; ++s) out[s] -= target.value[c * m + s];
      }
    }
    if (target.loss != Loss::cross_entropy) return;
    parallel_blocks(m, 512, 2 * outputs(), quiet(), [&](int64_t first, int64_t last) {
      double highest[512];
      for (int64_t s = first; s < last; ++s) highest[s - first] = p_.outputs64[s];
      for (int64_t c = 1; c < outputs(); ++c)
        for (int64_t s = first; s < last; ++s)
          highest[s - first] = larger(highest[s - first], p_.outputs64[c * m + s]);
      for (int64_t c = 0; c < outputs(); ++c)
        for (int64_t s = first; s < last; ++s) p_.outputs64[c * m + s] -= highest[s - first];
    });
  }

  Caller quiet() const {
    Caller caller = caller_;
    caller.poll = nullptr;
    return caller;
  }

  // Makes the batch that of step k, or (k = 0) all samples.
  void choose_batch(int64_t k) {
    batch_ = {p_.features, p_.target, 0};
    if (k == 0) return;
    const int64_t first = p_.starts[k - 1], size = p_.batch;
    const Target<double>& all = p_.target;
    Features& f = batch_.features;
    f.data = f.type == Type::float32
                 ? static_cast<const void*>(static_cast<const float*>(f.data) + first)
                 : static_cast<const void*>(static_cast<const double*>(f.data) + first);
    f.samples = size;
    batch_.first = first;
    if (all.label) batch_.target.label = all.label + first;
    batch_.target.value = columns(p_.value_batch, all.value, first);
    if (weight_per_sample()) {
      if (all.weight) batch_.target.weight = all.weight + first;
    } else {
      batch_.target.weight = columns(p_.weight_batch, all.weight, first);
    }
    columns(p_.linear_batch, p_.linear, first);
  }

  // out (C, batch) = from[:, first : first + batch]; null stays null.
  const double* columns(double* out, const double* from, int64_t first) const {
    if (!from) return nullptr;
    for (int64_t c = 0; c < outputs(); ++c)
      memcpy(out + c * p_.batch, from + c * samples() + first,
             static_cast<size_t>(p_.batch) * sizeof(double));
    return out;
  }

  // The loss's linear term for the candidates, if it has one.
  Status add_linear(int64_t k, const int64_t* candidates, int64_t n, double* scores,
                    double* errors) {
    if (!p_.linear) return Status::ok;
    if (batch_.features.samples == samples()) {
      for (int64_t i = 0; i < n; ++i) {
        const double term =
            linear_bias_ + shrink(k) * (linear_sum_ + p_.linear_unit[candidates[i]]);
        scores[i] += term;
        errors[i] += kLinearRoundings * Number<double>::epsilon * std::fabs(term);
      }
      return Status::ok;
    }
    const Status status =
        candidate_slope<double>(p_.slopes, p_.slope_errors, candidates, n, batch_.features,
                                p_.outgoing, p_.linear_batch, outputs(), caller_);
    for (int64_t i = 0; i < n; ++i) {  // a term that is the same for all candidates is left out
      scores[i] += shrink(k) * p_.slopes[i];
      errors[i] += shrink(k) * p_.slope_errors[i];
    }
    return status;
  }

  const Pointwise& p_;
  const Workspace& workspace_;
  const Caller& caller_;
  Batch batch_{};
  Tangent tangent_{};
  uint32_t picks_ = 0;
  int64_t tangent_step_ = 0;   // the step of tangent_
  double gradient_error_ = 0;  // bound on the norm of the error of outputs_gradient
  double linear_bias_ = 0, linear_sum_ = 0;
};

}  // namespace

// ---------------------------------------------------------------------------------------------

Status greedy_pointwise(Path& path, const Pointwise& pointwise, const Rule& rule,
                        const Workspace& workspace, const Caller& caller) {
  PointwiseObjective objective(pointwise, workspace, caller);
  const Status status = objective.start();
  if (status != Status::ok) return status;
  return greedy(path, objective, objective.units(), rule, workspace, caller);
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
