// Any loss of kernels.h, all greedy steps without a return to the caller, by scoring the
// candidates' losses: the algorithm of cpu/greedy_pointwise.cpp, as a fixed sequence of launches a
// step. Only the device knows how many candidates a launch works on (`counts`). There are none once
// the path has ended. The file is long because a step is one sequence of small launches that share
// memory.
#include "../rounding.h"
#include "../tangent.h"
#include "candidates.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

using cuda::kSums;
using cuda::Pointwise;

namespace {

constexpr int kThreads = 256;        // of kernels over samples
constexpr int kBlockThreads = 1024;  // of those with one block

// Places in `counts`: the number of candidates (workspace.available[0:n]), of those that are scored
// (workspace.contenders), of those that the next launch works on, and of all units. All are zero
// once the path is at its end.
enum Count { kCandidates = 0, kScored = 1, kLaunched = 2, kAll = 3 };

// The samples that a step scores on: its mini-batch, or all.
struct Batch {
  Features features;
  Target<double> target;  // rows `stride` apart; its scale is that of all samples
  const float *weight32, *value32;
  const double *linear, *sum;
  int64_t stride;
  bool partial;  // a mini-batch
};

// Up to kSums blocks; each writes its sums into a row of `sums`.
int64_t blocks_over(int64_t samples) {
  const int64_t blocks = ceil_div(samples, kThreads);
  return blocks < kSums ? blocks : kSums;
}

// The sum, or the largest, of a column over the rows that the blocks wrote. One warp.
__device__ __forceinline__ double total_of(const double* sums, int64_t blocks, int column,
                                           bool largest = false) {
  double total = 0;
  for (int64_t i = threadIdx.x % kLanes; i < blocks; i += kLanes) {
    const double x = sums[4 * i + column];
    total = largest ? larger(total, x) : total + x;
  }
  return largest ? -warp_min(-total) : warp_sum(total);
}

// Moves the units that step k may pick to the front of `available`, and copies them to
// `contenders`.
__global__ void __launch_bounds__(kBlockThreads)
    begin_step(Progress* progress, int64_t* counts, int64_t k, int64_t units, Rule rule,
               Workspace workspace) {
  int64_t* available = workspace.available;
  const unsigned thread = threadIdx.x;
  if (k == 1) {
    for (int64_t j = thread; j < units; j += blockDim.x) {
      available[j] = j;
      workspace.picked[j] = 0;
    }
    __syncthreads();
  }
  const int64_t left = rule.replacement ? units : units - progress->distinct;
  const bool done = k > rule.steps || progress->distinct >= rule.size || left <= 0;
  int64_t n = done ? 0 : left;
  if (rule.candidates && !done) {
    n = rule.candidates < left ? rule.candidates : left;
    if (thread == 0) draw(available, left, n, rule.draws + (k - 1) * rule.candidates);
    __syncthreads();
  }
  for (int64_t i = thread; i < n; i += blockDim.x) workspace.contenders[i] = available[i];
  if (thread == 0) {
    progress->done = done;
    counts[kCandidates] = counts[kScored] = counts[kLaunched] = n;
    counts[kAll] = done ? 0 : units;
  }
}

// base = b + z / k at the batch's samples, relative to the target as on the CPU, in both types; and
// the sums for rounding_bound.
__global__ void __launch_bounds__(kThreads)
    outputs_at(const Progress* progress, Pointwise p, Batch batch, double shrink) {
  if (progress->done) return;
  const int64_t m = batch.features.samples, outputs = batch.target.outputs;
  const Target<double>& target = batch.target;
  const bool per_sample = target.loss == Loss::cross_entropy;
  Rounding r = {0, 0, 0};
  const auto add = [&](double weight, double size) {
    r.weight_sum += weight;
    r.weight_largest = larger(r.weight_largest, weight);
    r.base += weight * size;
  };
  for (int64_t s = blockIdx.x * blockDim.x + threadIdx.x; s < m; s += gridDim.x * blockDim.x) {
    double highest = per_sample ? -HUGE_VALF : 0, size = 0;
    for (int64_t c = 0; per_sample && c < outputs; ++c)
      highest = larger(highest, p.bias[c] + shrink * batch.sum[c * batch.stride + s]);
    for (int64_t c = 0; c < outputs; ++c) {
      const int64_t at = c * batch.stride + s;
      double x = p.bias[c] + shrink * batch.sum[at] - highest;
      if (target.loss == Loss::squared_error) x -= target.value[at];
      p.outputs64[c * m + s] = x;
      p.outputs32[c * m + s] = static_cast<float>(x);
      size = larger(size, fabs(x));
      if (per_sample) continue;
      add(target.weight ? target.weight[at] : 1.0,
          target.loss == Loss::squared_error ? x * x : fabs(x));
    }
    if (per_sample) add(target.weight ? target.weight[s] : 1.0, size);
  }
  const double weight_sum = block_sum(r.weight_sum), largest = -block_min(-r.weight_largest);
  const double base = block_sum(r.base);
  if (threadIdx.x) return;
  double* row = p.sums + 4 * blockIdx.x;
  row[0] = weight_sum;
  row[1] = largest;
  row[2] = base;
}

// An upper bound of |phi_j|.
__device__ __forceinline__ double phi_norm(const Pointwise& p, int64_t j) {
  return sqrt(p.features.squares[j] * p.w_squares[j]);
}

// What sum_pieces does to a candidate's loss in Real: it adds the linear term and bounds the
// rounding error.
template <class Real>
struct FinishLoss {
  Pointwise p;
  const Progress* progress;
  Target<Real> target;
  double shrink;
  int64_t samples, blocks;
  const double* linear_slopes;  // (n) of the candidates on a mini-batch, or null
  Rounding rounding;

  __device__ void start() {
    rounding = {total_of(p.sums, blocks, 0), total_of(p.sums, blocks, 1, true),
                total_of(p.sums, blocks, 2)};
  }
  __device__ double operator()(double* loss, double total, int64_t i, int64_t unit) const {
    const Magnitudes size = {p.features.squares[unit], shrink * p.w_largest[unit],
                             shrink * p.w_sum[unit], shrink * shrink * p.w_squares[unit]};
    const double outputs = static_cast<double>(target.outputs), taken = Tiling<Real>::samples;
    const double chunks = 1 + outputs / Tiling<Real>::classes;
    const double error = rounding_bound(
        rounding, target, total, size,
        {2 * taken * kTerms + outputs / kTerms, outputs + 32 * chunks, taken}, samples);
    if (!p.linear) return error;
    double term = linear_slopes
                      ? shrink * linear_slopes[i]
                      : *p.linear_bias + shrink * (progress->linear_sum + p.linear_unit[unit]);
    *loss += term;
    return error + Number<double>::epsilon *
                       (kLinearRoundings * fabs(term) +
                        shrink * (outputs + kPieceRoundings) * p.linear_norm * phi_norm(p, unit));
  }
};

// Candidate j's lower bound from the tangent at the last step's outputs.
__device__ __forceinline__ double bound_of(const Progress& progress, const Pointwise& p, int64_t j,
                                           double shrink) {
  return tangent_bound(progress.tangent, p.slopes[j], shrink,
                       [&] { return shrink * progress.slope_error * phi_norm(p, j); });
}

// Chooses the candidates that are scored first: of the candidates whose places differ by a multiple
// of kScoredFirst, the one with the lowest bound.
__global__ void __launch_bounds__(kThreads)
    choose_first(const Progress* progress, Pointwise p, Workspace workspace, double shrink) {
  const int64_t n = p.counts[kCandidates], group = blockIdx.x * blockDim.x + threadIdx.x;
  if (group >= n) return;
  double lowest = HUGE_VALF;
  int64_t first = workspace.available[group];
  for (int64_t i = group; i < n; i += kScoredFirst) {
    const double bound = bound_of(*progress, p, workspace.available[i], shrink);
    p.bounds[i] = bound;
    if (bound < lowest) {
      lowest = bound;
      first = workspace.available[i];
    }
  }
  workspace.contenders[group] = first;
  if (group == 0) p.counts[kLaunched] = n < kScoredFirst ? n : kScoredFirst;
}

// Chooses the others whose bound is not above the lowest loss so far. One block.
__global__ void __launch_bounds__(kBlockThreads) choose_rest(Pointwise p, Workspace workspace) {
  const int64_t n = p.counts[kCandidates], first = p.counts[kLaunched];
  double lowest = HUGE_VALF;
  for (int64_t i = threadIdx.x; i < first; i += blockDim.x)
    lowest = fmin(lowest, workspace.scores[i] + workspace.errors[i]);
  lowest = block_min(lowest);
  int64_t chosen = 0;
  for (int64_t from = 0; n > kScoredFirst && from < n; from += blockDim.x) {
    const int64_t i = from + threadIdx.x;
    const int64_t unit = i < n ? workspace.available[i] : 0;
    const bool possible =
        i < n && p.bounds[i] <= lowest && workspace.contenders[i % kScoredFirst] != unit;
    int64_t total;
    const int64_t rank = block_rank(possible, &total);
    if (possible) workspace.contenders[kScoredFirst + chosen + rank] = unit;
    chosen += total;
  }
  if (threadIdx.x == 0) {
    p.counts[kLaunched] = chosen;
    p.counts[kScored] = first + chosen;
  }
}

// bounds[i] = the number of candidates that come before the i-th, by score and then by index.
__global__ void __launch_bounds__(kThreads) rank_scores(Pointwise p, Workspace workspace) {
  const int64_t n = p.counts[kScored], i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const double score = workspace.scores[i];
  const int64_t unit = workspace.contenders[i];
  int64_t before = 0;
  for (int64_t other = 0; other < n; ++other) {
    const double x = workspace.scores[other];
    before += x < score || (x == score && workspace.contenders[other] < unit);
  }
  p.bounds[i] = static_cast<double>(before);
}

// Keeps those of the first n contenders for which keep(i) holds; returns how many. One block.
template <class Keep>
__device__ __forceinline__ int64_t compact(const Workspace& workspace, int64_t n,
                                           const Keep& keep) {
  int64_t kept = 0;
  for (int64_t from = 0; from < n; from += blockDim.x) {
    const int64_t i = from + threadIdx.x;
    const bool stays = i < n && keep(i);
    const int64_t unit = i < n ? workspace.contenders[i] : 0;
    int64_t total;
    const int64_t rank = block_rank(stays, &total);  // a barrier: all have read their units
    if (stays) workspace.contenders[kept + rank] = unit;
    kept += total;
  }
  return kept;
}

__global__ void __launch_bounds__(kBlockThreads)
    keep_shortlist(Progress* progress, Pointwise p, Workspace workspace, int64_t wanted) {
  const int64_t n = p.counts[kScored];
  const int64_t kept =
      compact(workspace, n, [&](int64_t i) { return p.bounds[i] < static_cast<double>(wanted); });
  if (threadIdx.x == 0) {
    progress->scored += n;
    p.counts[kScored] = p.counts[kLaunched] = kept;
  }
}

// Keeps the contenders that may be the lowest, allowing for rounding. They are scored again, unless
// there is one alone.
__global__ void __launch_bounds__(kBlockThreads)
    keep_contenders(Progress* progress, Pointwise p, Workspace workspace, bool counted) {
  const int64_t n = p.counts[kScored];
  double above = HUGE_VALF;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
    above = fmin(above, workspace.scores[i] + workspace.errors[i]);
  const double lowest = block_min(above);
  const int64_t kept = compact(workspace, n, [&](int64_t i) {
    return is_contender(workspace.scores[i], workspace.errors[i], lowest);
  });
  if (threadIdx.x == 0) {
    if (counted) progress->scored += n;
    p.counts[kScored] = kept;
    p.counts[kLaunched] = kept > 1 ? kept : 0;
  }
}

// Picks the contender with the lowest score; ties go to the lowest index. One block.
__global__ void __launch_bounds__(kBlockThreads)
    pick(Progress* progress, Path path, Pointwise p, Rule rule, Workspace workspace, int64_t k) {
  if (progress->done) return;
  const int64_t n = p.counts[kScored], distinct = progress->distinct;
  double above = HUGE_VALF;
  for (int64_t i = threadIdx.x; n > 1 && i < n; i += blockDim.x)
    above = fmin(above, workspace.scores[i] + workspace.errors[i]);
  const double lowest = block_min(above);
  int64_t unit = kNoUnit;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    if (n == 1 || is_contender(workspace.scores[i], workspace.errors[i], lowest))
      unit = lesser(unit, workspace.contenders[i]);
  }
  unit = block_min(unit);
  if (!rule.replacement) take(workspace.available, p.features.units - distinct, unit);
  if (threadIdx.x) return;
  path.order[k - 1] = unit;
  progress->length = k;
  progress->distinct = distinct + (workspace.picked[unit] ? 0 : 1);
  workspace.picked[unit] = 1;
  if (n > 1) progress->rescored += n;
  if (p.linear) progress->linear_sum += p.linear_unit[unit];
}

template <class Feature>
__device__ __forceinline__ double feature_at(const Features& f, int64_t unit, int64_t s) {
  return real_of<double>(static_cast<const Feature*>(f.data)[unit * f.stride + s]);
}

__device__ __forceinline__ double feature_of(const Features& f, int64_t unit, int64_t s) {
  switch (f.type) {
    case Type::float32:
      return feature_at<float>(f, unit, s);
    case Type::float64:
      return feature_at<double>(f, unit, s);
    case Type::bfloat16:
      return feature_at<__nv_bfloat16>(f, unit, s);
    case Type::float16:
      return feature_at<__half>(f, unit, s);
  }
  return 0;
}

// Adds phi of the picked unit to z. Sums the loss at b + z / k and, where the gap is wanted, writes
// the gradient there and sums <gradient, z>, the magnitudes of its terms, and the squares.
__global__ void __launch_bounds__(kThreads)
    add_picked(const Progress* progress, Path path, Pointwise p, int64_t k, double shrink) {
  if (progress->done) return;
  const int64_t m = p.features.samples, outputs = p.target.outputs, unit = path.order[k - 1];
  const Target<double>& t = p.target;
  const double* w = p.outgoing + unit * outputs;
  double loss = 0, along = 0, magnitude = 0, squares = 0;
  for (int64_t s = blockIdx.x * blockDim.x + threadIdx.x; s < m; s += gridDim.x * blockDim.x) {
    const double h = feature_of(p.features, unit, s);
    double highest = -HUGE_VALF, sum = 0;
    for (int64_t c = 0; c < outputs; ++c) {
      const double z = p.sum[c * m + s] + w[c] * h;
      p.sum[c * m + s] = z;
      highest = larger(highest, p.bias[c] + shrink * z);
    }
    const double weight = t.loss == Loss::cross_entropy && t.weight ? t.weight[s] : 1.0;
    if (t.loss == Loss::cross_entropy) {
      for (int64_t c = 0; c < outputs; ++c)
        sum += exp_nonpositive(p.bias[c] + shrink * p.sum[c * m + s] - highest);
      const int64_t label = t.label[s];
      const double of_label = p.bias[label] + shrink * p.sum[label * m + s];
      loss += weight * cross_entropy(highest, sum, of_label);
    }
    for (int64_t c = 0; c < outputs; ++c) {
      const int64_t at = c * m + s;
      const double z = p.sum[at], x = p.bias[c] + shrink * z;
      double gradient = 0;
      if (t.loss == Loss::cross_entropy) {
        gradient = exp_nonpositive(x - highest) / sum - (c == t.label[s] ? 1 : 0);
        gradient *= weight;
      } else {
        const double share = t.weight ? t.weight[at] : 1.0, y = t.value[at];
        const bool square = t.loss == Loss::squared_error;
        loss += share * (square ? SquaredError::loss(x - y, 0.0) : Logistic::loss(x, y));
        gradient =
            share * (square ? SquaredError::derivative(x - y, 0.0) : Logistic::derivative(x, y));
      }
      if (!path.gap) continue;
      gradient = t.scale * gradient + (p.linear ? p.linear[at] : 0.0);
      p.outputs64[at] = gradient;
      p.outputs32[at] = static_cast<float>(gradient);
      along += gradient * z;
      magnitude += fabs(gradient * z);
      squares += gradient * gradient;
    }
  }
  loss = block_sum(loss);
  along = block_sum(along);
  magnitude = block_sum(magnitude);
  squares = block_sum(squares);
  if (threadIdx.x) return;
  double* row = p.sums + 4 * blockIdx.x;
  row[0] = loss;
  row[1] = along;
  row[2] = magnitude;
  row[3] = squares;
}

// Adds up the sums of add_picked. One warp.
__global__ void settle(Progress* progress, Path path, Pointwise p, int64_t k, double shrink,
                       int64_t blocks) {
  if (progress->done) return;
  double loss = p.target.scale * total_of(p.sums, blocks, 0);
  const double along = shrink * total_of(p.sums, blocks, 1);
  const double magnitude = shrink * total_of(p.sums, blocks, 2);
  const double norm = sqrt(total_of(p.sums, blocks, 3));
  if (threadIdx.x) return;
  if (p.linear) loss += *p.linear_bias + shrink * progress->linear_sum;
  const double outputs = static_cast<double>(p.target.outputs);
  const double terms = outputs * static_cast<double>(p.features.samples);
  constexpr double epsilon = Number<double>::epsilon;
  path.losses[k - 1] = loss;
  progress->tangent = {
      loss, along, epsilon * fma(terms + kTotalRoundings, magnitude, kTotalRoundings * fabs(loss))};
  // The error of a slope relative to |phi_j| (rounding.h): of its sums in float32 over the outputs
  // and a thread's samples (at most 8), of the gradient, and of products that underflow.
  progress->slope_error =
      static_cast<double>(Number<float>::epsilon) * (outputs + kSlopeRoundings + 8) * norm +
      kGradientRoundings * epsilon * p.weights_norm * p.target.scale +
      static_cast<double>(Number<float>::tiny) * 8 * sqrt(terms);
}

// Keeps the units that may have the lowest slope, allowing for rounding. One block.
__global__ void __launch_bounds__(kBlockThreads)
    keep_steepest(const Progress* progress, Pointwise p, Workspace workspace) {
  const int64_t n = p.counts[kAll];
  double above = HUGE_VALF;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    workspace.contenders[j] = j;
    above = fmin(above, p.slopes[j] + progress->slope_error * phi_norm(p, j));
  }
  const double lowest = block_min(above);
  const int64_t kept = compact(workspace, n, [&](int64_t j) {
    return is_contender(p.slopes[j], progress->slope_error * phi_norm(p, j), lowest);
  });
  if (threadIdx.x == 0) p.counts[kLaunched] = kept;
}

__global__ void __launch_bounds__(kBlockThreads)
    end_gap(const Progress* progress, Path path, Pointwise p, Workspace workspace, int64_t k) {
  if (progress->done) return;
  double lowest = HUGE_VALF;
  for (int64_t i = threadIdx.x; i < p.counts[kLaunched]; i += blockDim.x)
    lowest = fmin(lowest, workspace.scores[i]);
  lowest = block_min(lowest);
  if (threadIdx.x == 0) path.gap[k - 1] = progress->tangent.along - lowest;
}

// ---------------------------------------------------------------------------------------------

// The launches of one path.
class PathLauncher {
 public:
  PathLauncher(Progress* progress, const Path& path, const Pointwise& p, const Rule& rule,
               const Workspace& workspace, void* stream)
      : progress_(progress),
        path_(path),
        p_(p),
        rule_(rule),
        workspace_(workspace),
        launch_(stream) {}

  void step(int64_t k) {
    const int64_t units = p_.features.units;
    const double shrink = 1 / static_cast<double>(k);
    block(begin_step, progress_, p_.counts, k, units, rule_, workspace_);
    choose_batch(p_.batch ? k : 0);
    over_samples(outputs_at, progress_, p_, batch_, shrink);
    if (path_.gap && k > 1) {
      launch_(choose_first, ceil_div(kScoredFirst, kThreads), kThreads, progress_, p_, workspace_,
              shrink);
      screen(shrink, 0, units < kScoredFirst ? units : kScoredFirst);
      block(choose_rest, p_, workspace_);
      if (units > kScoredFirst) screen(shrink, kScoredFirst, units - kScoredFirst);
    } else {
      screen(shrink, 0, units);
    }
    if (rule_.shortlist) {
      launch_(rank_scores, ceil_div(units, kThreads), kThreads, p_, workspace_);
      block(keep_shortlist, progress_, p_, workspace_, rule_.shortlist);
      choose_batch(0);
      over_samples(outputs_at, progress_, p_, batch_, shrink);
      screen(shrink, 0, rule_.shortlist < units ? rule_.shortlist : units);
    }
    block(keep_contenders, progress_, p_, workspace_, !rule_.shortlist);
    score<double>(p_.outgoing, p_.outputs64, batch_.target, shrink, 0, units);
    block(pick, progress_, path_, p_, rule_, workspace_, k);
    choose_batch(0);
    over_samples(add_picked, progress_, path_, p_, k, shrink);
    launch_(settle, 1, kLanes, progress_, path_, p_, k, shrink, blocks_over(p_.features.samples));
    if (path_.gap) gap(k);
  }

  Status status() const { return launch_.status(); }

 private:
  template <class Kernel, class... Arguments>
  void block(Kernel kernel, const Arguments&... arguments) {
    const int64_t threads = kLanes * ceil_div(p_.features.units, kLanes);
    launch_(kernel, 1, static_cast<int>(threads < kBlockThreads ? threads : kBlockThreads),
            arguments...);
  }

  template <class Kernel, class... Arguments>
  void over_samples(Kernel kernel, const Arguments&... arguments) {
    launch_(kernel, blocks_over(batch_.features.samples), kThreads, arguments...);
  }

  // Makes the batch that of step k, or (k = 0) all samples.
  void choose_batch(int64_t k) {
    const Target<double>& all = p_.target;
    const int64_t m = p_.features.samples, first = k ? p_.starts[k - 1] : 0;
    const auto from = [&](auto* rows) { return rows ? rows + first : nullptr; };
    batch_ = {
        p_.features, all,   from(p_.weight32), from(p_.value32), from(p_.linear), p_.sum + first,
        m,           k != 0};
    batch_.target.value = from(all.value);
    batch_.target.label = from(all.label);
    batch_.target.weight = from(all.weight);
    if (!k) return;
    const int64_t bytes = p_.features.type == Type::float64   ? 8
                          : p_.features.type == Type::float32 ? 4
                                                              : 2;
    batch_.features.data = static_cast<const char*>(p_.features.data) + first * bytes;
    batch_.features.samples = p_.batch;
  }

  void screen(double shrink, int64_t from, int64_t most) {
    const Target<double>& t = batch_.target;
    score<float>(p_.outgoing32, p_.outputs32,
                 {t.loss, t.outputs, batch_.value32, t.label, batch_.weight32, t.scale}, shrink,
                 from, most);
  }

  // Scores counts[kLaunched] (at most `most`) contenders from the from-th on, with errors.
  template <class Real>
  void score(const Real* outgoing, const Real* base, const Target<Real>& target, double shrink,
             int64_t from, int64_t most) {
    const int64_t m = batch_.features.samples;
    const int64_t *units = workspace_.contenders + from, *count = p_.counts + kLaunched;
    double *scores = workspace_.scores + from, *errors = workspace_.errors + from;
    const double* linear_slopes = nullptr;
    if (batch_.partial && p_.linear) {
      slopes<double>(p_.slopes, units, count, most, p_.outgoing, batch_.linear, batch_.stride);
      linear_slopes = p_.slopes;
    }
    score_losses(launch_,
                 {p_.partial, units, count, most, batch_.features, p_.reach, HUGE_VALF, outgoing,
                  static_cast<Real>(shrink), base, m, target, batch_.stride, false});
    launch_sum(
        launch_, scores, errors, p_.partial, units, count, most, m, target.scale,
        FinishLoss<Real>{p_, progress_, target, shrink, m, blocks_over(m), linear_slopes, {}});
  }

  template <class Real>
  void slopes(double* out, const int64_t* units, const int64_t* count, int64_t most,
              const Real* outgoing, const Real* gradient, int64_t stride) {
    Target<Real> none = {};
    none.outputs = p_.target.outputs;
    const int64_t m = batch_.features.samples;
    score_slopes(launch_, {p_.partial, units, count, most, batch_.features, nullptr, HUGE_VALF,
                           outgoing, Real(1), gradient, stride, none, m, false});
    launch_sum(launch_, out, nullptr, p_.partial, units, count, most, m, 1.0, Plain());
  }

  // Comes after add_picked, whose gradient is in outputs64 and outputs32.
  void gap(int64_t k) {
    const int64_t units = p_.features.units, m = p_.features.samples;
    slopes<float>(p_.slopes, nullptr, p_.counts + kAll, units, p_.outgoing32, p_.outputs32, m);
    block(keep_steepest, progress_, p_, workspace_);
    slopes<double>(workspace_.scores, workspace_.contenders, p_.counts + kLaunched, units,
                   p_.outgoing, p_.outputs64, m);
    block(end_gap, progress_, path_, p_, workspace_, k);
  }

  Progress* progress_;
  Path path_;
  Pointwise p_;
  Rule rule_;
  Workspace workspace_;
  Launcher launch_;
  Batch batch_{};
};

}  // namespace
}  // namespace GREEDYPRUNE_ISA

// ---------------------------------------------------------------------------------------------

Status cuda::greedy_pointwise(Progress* progress, const Path& path, const Pointwise& objective,
                              const Rule& rule, const Workspace& workspace, int64_t first,
                              int64_t last, void* stream) {
  GREEDYPRUNE_ISA::PathLauncher launcher(progress, path, objective, rule, workspace, stream);
  for (int64_t k = first; k <= last; ++k) launcher.step(k);
  return launcher.status();
}

}  // namespace greedyprune
