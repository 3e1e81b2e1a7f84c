// Any loss of kernels.h, all greedy steps without a return to the caller, by scoring the
// candidates' losses: what cpu/greedy_pointwise.cpp says, as a fixed sequence of launches a step.
// How many candidates each is about is known on the device alone (`counts`); once the path is at
// its end, there are none.
#include "../rounding.h"
#include "candidates.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {

using cuda::kSums;
using cuda::Pointwise;

namespace {

constexpr int kThreads = 256;        // of kernels over samples
constexpr int kBlockThreads = 1024;  // of those with one block
constexpr int64_t kFirst = 512;      // candidates that are scored before any is ruled out

// In `counts`: how many candidates there are (workspace.available[0:n]), how many of them are
// scored (workspace.contenders), how many of those another launch is about, and how many units
// there are: none once the path is at its end.
enum Count { kCandidates = 0, kScored = 1, kSome = 2, kAll = 3 };

// The samples that a step looks at, and what is needed of them.
struct Seen {
  Features features;
  Target<double> target;  // rows `stride` apart, its scale that of all samples
  const float *weight32, *value32;
  const double *linear, *sum;
  int64_t stride;
  bool part;  // a mini-batch
};

// Up to kSums blocks; each leaves its sums in a row of `sums`.
int64_t blocks_over(int64_t samples) {
  const int64_t blocks = ceil_div(samples, kThreads);
  return blocks < kSums ? blocks : kSums;
}

// The sum (of column 1: the largest) over the rows that so many blocks left. A warp.
__device__ __forceinline__ double total_of(const double* sums, int64_t blocks, int column,
                                           bool largest = false) {
  double total = 0;
  for (int64_t i = threadIdx.x % kLanes; i < blocks; i += kLanes) {
    const double x = sums[4 * i + column];
    total = largest ? larger(total, x) : total + x;
  }
  return largest ? -warp_min(-total) : warp_sum(total);
}

// What step k may pick goes to the front of `available`, and to `contenders`.
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
    counts[kCandidates] = counts[kScored] = counts[kSome] = n;
    counts[kAll] = done ? 0 : units;
  }
}

// base = b + z / k at the samples seen, relative to the target as on the CPU, in both types, and
// what rounding_bound needs to know of it.
__global__ void __launch_bounds__(kThreads)
    outputs_at(const Progress* progress, Pointwise p, Seen seen, double part) {
  if (progress->done) return;
  const int64_t m = seen.features.samples, outputs = seen.target.outputs;
  const Target<double>& target = seen.target;
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
      highest = larger(highest, p.bias[c] + part * seen.sum[c * seen.stride + s]);
    for (int64_t c = 0; c < outputs; ++c) {
      const int64_t at = c * seen.stride + s;
      double x = p.bias[c] + part * seen.sum[at] - highest;
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

// |phi_j| over samples and outputs, or more.
__device__ __forceinline__ double phi_norm(const Pointwise& p, int64_t j) {
  return sqrt(p.features.squares[j] * p.w_squares[j]);
}

// What sum_pieces makes of a candidate's losses computed in Real: it adds the linear term, and
// bounds what rounding can have done.
template <class Real>
struct FinishLoss {
  Pointwise p;
  const Progress* progress;
  Target<Real> target;
  double part;
  int64_t samples, blocks;
  const double* linear_slopes;  // (n) of the candidates on a mini-batch, or null
  Rounding rounding;

  __device__ void start() {
    rounding = {total_of(p.sums, blocks, 0), total_of(p.sums, blocks, 1, true),
                total_of(p.sums, blocks, 2)};
  }
  __device__ double operator()(double* loss, double total, int64_t i, int64_t unit) const {
    const Magnitudes size = {p.features.squares[unit], part * p.w_largest[unit],
                             part * p.w_sum[unit], part * part * p.w_squares[unit]};
    const double outputs = static_cast<double>(target.outputs), taken = Tiling<Real>::samples;
    const double chunks = 1 + outputs / Tiling<Real>::classes;
    const double error = rounding_bound(
        rounding, target, total, size,
        {2 * taken * kTerms + outputs / kTerms, outputs + 32 * chunks, taken}, samples);
    if (!p.linear) return error;
    double term = linear_slopes
                      ? part * linear_slopes[i]
                      : *p.linear_bias + part * (progress->linear_sum + p.linear_unit[unit]);
    *loss += term;
    return error +
           Number<double>::epsilon *
               (4 * fabs(term) + part * (outputs + 128) * p.linear_norm * phi_norm(p, unit));
  }
};

// What the tangent at the last step's outputs u says of candidate j at step k: the losses are
// convex, L(x) >= L(u) + <L'(u), x - u>.
__device__ __forceinline__ double bound_of(const Progress& at, const Pointwise& p, int64_t j,
                                           double part) {
  const double bound = at.loss + part * (p.slopes[j] - at.along) -
                       part * at.slope_error * phi_norm(p, j) - at.tangent_error;
  return isfinite(bound) ? bound : -HUGE_VALF;
}

// Of every kFirst-th candidate the one with the lowest bound: those are scored first.
__global__ void __launch_bounds__(kThreads)
    choose_first(const Progress* progress, Pointwise p, Workspace workspace, double part) {
  const int64_t n = p.counts[kCandidates], group = blockIdx.x * blockDim.x + threadIdx.x;
  if (group >= n) return;
  double lowest = HUGE_VALF;
  int64_t first = workspace.available[group];
  for (int64_t i = group; i < n; i += kFirst) {
    const double bound = bound_of(*progress, p, workspace.available[i], part);
    p.bounds[i] = bound;
    if (bound < lowest) {
      lowest = bound;
      first = workspace.available[i];
    }
  }
  workspace.contenders[group] = first;
  if (group == 0) p.counts[kSome] = n < kFirst ? n : kFirst;
}

// Then those whose bound is not above the lowest loss found. One block.
__global__ void __launch_bounds__(kBlockThreads) choose_rest(Pointwise p, Workspace workspace) {
  const int64_t n = p.counts[kCandidates], first = p.counts[kSome];
  double lowest = HUGE_VALF;
  for (int64_t i = threadIdx.x; i < first; i += blockDim.x)
    lowest = fmin(lowest, workspace.scores[i] + workspace.errors[i]);
  lowest = block_min(lowest);
  int64_t chosen = 0;
  for (int64_t from = 0; n > kFirst && from < n; from += blockDim.x) {
    const int64_t i = from + threadIdx.x;
    const int64_t unit = i < n ? workspace.available[i] : 0;
    const bool possible =
        i < n && p.bounds[i] <= lowest && workspace.contenders[i % kFirst] != unit;
    int64_t total;
    const int64_t rank = block_rank(possible, &total);
    if (possible) workspace.contenders[kFirst + chosen + rank] = unit;
    chosen += total;
  }
  if (threadIdx.x == 0) {
    p.counts[kSome] = chosen;
    p.counts[kScored] = first + chosen;
  }
}

// bounds[i] = how many candidates come before the i-th, by score and then index.
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

// Keeps of the first n contenders those for which keep(i) holds; how many. One block.
template <class Keep>
__device__ __forceinline__ int64_t compact(const Workspace& workspace, int64_t n,
                                           const Keep& keep) {
  int64_t kept = 0;
  for (int64_t from = 0; from < n; from += blockDim.x) {
    const int64_t i = from + threadIdx.x;
    const bool stays = i < n && keep(i);
    const int64_t unit = i < n ? workspace.contenders[i] : 0;
    int64_t total;
    const int64_t rank = block_rank(stays, &total);  // all have read theirs
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
    p.counts[kScored] = p.counts[kSome] = kept;
  }
}

// Keeps those that rounding does not rule out as the lowest; they are scored again, unless there is
// one alone.
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
    p.counts[kSome] = kept > 1 ? kept : 0;
  }
}

// Picks the lowest of the contenders; of those that are equal the lowest index. One block.
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

// z += phi of the unit picked; at b + z / k the loss and, where the gap is wanted, its gradient
// with what is summed of that: <gradient, z>, the sum of the magnitudes, and the squares.
__global__ void __launch_bounds__(kThreads)
    add_picked(const Progress* progress, Path path, Pointwise p, int64_t k, double part) {
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
      highest = larger(highest, p.bias[c] + part * z);
    }
    const double weight = t.loss == Loss::cross_entropy && t.weight ? t.weight[s] : 1.0;
    if (t.loss == Loss::cross_entropy) {
      for (int64_t c = 0; c < outputs; ++c)
        sum += exp_nonpositive(p.bias[c] + part * p.sum[c * m + s] - highest);
      const int64_t label = t.label[s];
      const double own = p.bias[label] + part * p.sum[label * m + s];
      loss += weight * cross_entropy(highest, sum, own);
    }
    for (int64_t c = 0; c < outputs; ++c) {
      const int64_t at = c * m + s;
      const double z = p.sum[at], x = p.bias[c] + part * z;
      double gradient = 0;
      if (t.loss == Loss::cross_entropy) {
        gradient = exp_nonpositive(x - highest) / sum - (c == t.label[s] ? 1 : 0);
        gradient *= weight;
      } else {
        const double own = t.weight ? t.weight[at] : 1.0, y = t.value[at];
        const bool square = t.loss == Loss::squared_error;
        loss += own * (square ? SquaredError::loss(x - y, 0.0) : Logistic::loss(x, y));
        gradient =
            own * (square ? SquaredError::derivative(x - y, 0.0) : Logistic::derivative(x, y));
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

// Adds up what add_picked left. One warp.
__global__ void settle(Progress* progress, Path path, Pointwise p, int64_t k, double part,
                       int64_t blocks) {
  if (progress->done) return;
  double loss = p.target.scale * total_of(p.sums, blocks, 0);
  const double along = part * total_of(p.sums, blocks, 1);
  const double magnitude = part * total_of(p.sums, blocks, 2);
  const double norm = sqrt(total_of(p.sums, blocks, 3));
  if (threadIdx.x) return;
  if (p.linear) loss += *p.linear_bias + part * progress->linear_sum;
  const double outputs = static_cast<double>(p.target.outputs);
  const double terms = outputs * static_cast<double>(p.features.samples);
  constexpr double epsilon = Number<double>::epsilon;
  path.losses[k - 1] = loss;
  progress->loss = loss;
  progress->along = along;
  progress->tangent_error = epsilon * (32 * fabs(loss) + (terms + 32) * magnitude);
  // Of a slope in float32, by |phi_j| (Cauchy-Schwarz); of the gradient; of what underflows.
  progress->slope_error = static_cast<double>(Number<float>::epsilon) * (outputs + 16) * norm +
                          16 * epsilon * p.weights_norm * p.target.scale +
                          static_cast<double>(Number<float>::tiny) * 8 * sqrt(terms);
}

// The units that may have the lowest slope. One block.
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
  if (threadIdx.x == 0) p.counts[kSome] = kept;
}

__global__ void __launch_bounds__(kBlockThreads)
    end_gap(const Progress* progress, Path path, Pointwise p, Workspace workspace, int64_t k) {
  if (progress->done) return;
  double lowest = HUGE_VALF;
  for (int64_t i = threadIdx.x; i < p.counts[kSome]; i += blockDim.x)
    lowest = fmin(lowest, workspace.scores[i]);
  lowest = block_min(lowest);
  if (threadIdx.x == 0) path.gap[k - 1] = progress->along - lowest;
}

// ---------------------------------------------------------------------------------------------

// The launches of one path.
class Steps {
 public:
  Steps(Progress* progress, const Path& path, const Pointwise& p, const Rule& rule,
        const Workspace& workspace, void* stream)
      : progress_(progress),
        path_(path),
        p_(p),
        rule_(rule),
        workspace_(workspace),
        launch_(stream) {}

  void step(int64_t k) {
    const int64_t units = p_.features.units;
    const double part = 1 / static_cast<double>(k);
    block(begin_step, progress_, p_.counts, k, units, rule_, workspace_);
    see(p_.batch ? k : 0);
    over_samples(outputs_at, progress_, p_, seen_, part);
    if (path_.gap && k > 1) {
      launch_(choose_first, ceil_div(kFirst, kThreads), kThreads, progress_, p_, workspace_, part);
      screen(part, 0, units < kFirst ? units : kFirst);
      block(choose_rest, p_, workspace_);
      if (units > kFirst) screen(part, kFirst, units - kFirst);
    } else {
      screen(part, 0, units);
    }
    if (rule_.shortlist) {
      launch_(rank_scores, ceil_div(units, kThreads), kThreads, p_, workspace_);
      block(keep_shortlist, progress_, p_, workspace_, rule_.shortlist);
      see(0);
      over_samples(outputs_at, progress_, p_, seen_, part);
      screen(part, 0, rule_.shortlist < units ? rule_.shortlist : units);
    }
    block(keep_contenders, progress_, p_, workspace_, !rule_.shortlist);
    score<double>(p_.outgoing, p_.outputs64, seen_.target, part, 0, units);
    block(pick, progress_, path_, p_, rule_, workspace_, k);
    see(0);
    over_samples(add_picked, progress_, path_, p_, k, part);
    launch_(settle, 1, kLanes, progress_, path_, p_, k, part, blocks_over(p_.features.samples));
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
    launch_(kernel, blocks_over(seen_.features.samples), kThreads, arguments...);
  }

  // Turns to the mini-batch of step k, or (k = 0) to all samples.
  void see(int64_t k) {
    const Target<double>& all = p_.target;
    const int64_t m = p_.features.samples, first = k ? p_.starts[k - 1] : 0;
    const auto from = [&](auto* rows) { return rows ? rows + first : nullptr; };
    seen_ = {
        p_.features, all,   from(p_.weight32), from(p_.value32), from(p_.linear), p_.sum + first,
        m,           k != 0};
    seen_.target.value = from(all.value);
    seen_.target.label = from(all.label);
    seen_.target.weight = from(all.weight);
    if (!k) return;
    const int64_t bytes = p_.features.type == Type::float64   ? 8
                          : p_.features.type == Type::float32 ? 4
                                                              : 2;
    seen_.features.data = static_cast<const char*>(p_.features.data) + first * bytes;
    seen_.features.samples = p_.batch;
  }

  void screen(double part, int64_t from, int64_t most) {
    const Target<double>& t = seen_.target;
    score<float>(p_.outgoing32, p_.outputs32,
                 {t.loss, t.outputs, seen_.value32, t.label, seen_.weight32, t.scale}, part, from,
                 most);
  }

  // scores and errors of counts[kSome] (at most `most`) contenders from the from-th on.
  template <class Real>
  void score(const Real* outgoing, const Real* base, const Target<Real>& target, double part,
             int64_t from, int64_t most) {
    const int64_t m = seen_.features.samples;
    const int64_t *units = workspace_.contenders + from, *count = p_.counts + kSome;
    double *scores = workspace_.scores + from, *errors = workspace_.errors + from;
    const double* linear_slopes = nullptr;
    if (seen_.part && p_.linear) {
      slopes<double>(p_.slopes, units, count, most, p_.outgoing, seen_.linear, seen_.stride);
      linear_slopes = p_.slopes;
    }
    score_losses(launch_,
                 {p_.partial, units, count, most, seen_.features, p_.reach, HUGE_VALF, outgoing,
                  static_cast<Real>(part), base, m, target, seen_.stride, false});
    launch_sum(launch_, scores, errors, p_.partial, units, count, most, m, target.scale,
               FinishLoss<Real>{p_, progress_, target, part, m, blocks_over(m), linear_slopes, {}});
  }

  template <class Real>
  void slopes(double* out, const int64_t* units, const int64_t* count, int64_t most,
              const Real* outgoing, const Real* gradient, int64_t stride) {
    Target<Real> none = {};
    none.outputs = p_.target.outputs;
    const int64_t m = seen_.features.samples;
    score_slopes(launch_, {p_.partial, units, count, most, seen_.features, nullptr, HUGE_VALF,
                           outgoing, Real(1), gradient, stride, none, m, false});
    launch_sum(launch_, out, nullptr, p_.partial, units, count, most, m, 1.0, Plain());
  }

  // Follows add_picked, whose gradient is in outputs64 and outputs32.
  void gap(int64_t k) {
    const int64_t units = p_.features.units, m = p_.features.samples;
    slopes<float>(p_.slopes, nullptr, p_.counts + kAll, units, p_.outgoing32, p_.outputs32, m);
    block(keep_steepest, progress_, p_, workspace_);
    slopes<double>(workspace_.scores, workspace_.contenders, p_.counts + kSome, units, p_.outgoing,
                   p_.outputs64, m);
    block(end_gap, progress_, path_, p_, workspace_, k);
  }

  Progress* progress_;
  Path path_;
  Pointwise p_;
  Rule rule_;
  Workspace workspace_;
  Launcher launch_;
  Seen seen_{};
};

}  // namespace
}  // namespace GREEDYPRUNE_ISA

// ---------------------------------------------------------------------------------------------

Status cuda::greedy_pointwise(Progress* progress, const Path& path, const Pointwise& objective,
                              const Rule& rule, const Workspace& workspace, int64_t first,
                              int64_t last, void* stream) {
  GREEDYPRUNE_ISA::Steps steps(progress, path, objective, rule, workspace, stream);
  for (int64_t k = first; k <= last; ++k) steps.step(k);
  return steps.status();
}

}  // namespace greedyprune
