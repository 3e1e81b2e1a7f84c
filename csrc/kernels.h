// The whole contract between Python and the compiled half: types, shapes, launchers.
//
// Notation (README, "What it computes"): N units, m samples, C outputs. Unit j adds
// phi_j(s) = h_j(s) * w_j to the outputs, with h the features and w the outgoing weights
// (already scaled by N, the papers' mean-field scaling). A greedy step k picks
//
//     i_k = argmin_j  L( b + (z + phi_j) / k ),   z = sum of the phi picked so far.        (1)
//
// Rules: plain pointers and 64-bit sizes; outputs first; the caller owns all memory, scratch
// included; kernels never allocate and never throw.
#pragma once

#include <cstdint>

namespace greedyprune {

enum class Status : int32_t { ok = 0, stopped = 1, bad_argument = 2, device_error = 3 };
enum class Loss : int32_t { squared_error = 0, cross_entropy = 1, logistic = 2 };
enum class Type : int32_t {
  float32 = 0,
  float64 = 1,
  bfloat16 = 2,
  float16 = 3
};  // of 16 bits: CUDA

struct Features {    // the units' activations, unit-major
  const void* data;  // (units, samples), rows `stride` elements apart
  Type type;
  int64_t units, samples, stride;
  const double* squares;  // (units) the sum of the squares of each row, or more
  const double* largest;  // (units) the largest magnitude in each row, or more
};

// What the outputs f (C, m) are compared with:
//   loss(f) = scale * sum_s weight_s * l(f[:, s]),  summed over the outputs too where l is
// elementwise.
template <class Real>
struct Target {
  Loss loss;
  int64_t outputs;       // C
  const Real* value;     // (C, m)  logistic: the targets in [0, 1]; else null
  const int32_t* label;  // (m)     cross_entropy: the classes in [0, C); else null
  const Real* weight;    // (m) cross_entropy, (C, m) logistic and squared_error; null: ones
  double scale;
};

// How a kernel reaches its caller. The functions run on the calling thread only; a nonzero
// answer ends the kernel with Status::stopped.
struct Caller {
  void* self;
  int (*poll)(void* self);                                        // every 50 ms or so
  int (*step)(void* self, int64_t k, int64_t unit, double loss);  // after each greedy step
  // Compute the Gram columns of wanted[0:count] into rows [slot, slot + count) of the cache.
  int (*fetch)(void* self, int64_t slot, int64_t count);
  // Add up workspace.exchange[0:count] over the processes that have a part of the samples; `picks`
  // differs where theirs did.
  int (*sum)(void* self, int64_t count, uint32_t picks);
  int32_t threads;
};

// When the greedy loop stops and what it may pick.
struct Rule {
  int64_t steps;        // at most so many picks
  int64_t size;         // stop once so many distinct units are picked
  bool replacement;     // may a unit be picked again?
  int64_t candidates;   // random candidates a step; 0: every unit
  const double* draws;  // (steps, candidates) uniform in [0, 1), or null
  int64_t shortlist;    // score so many of the best again on all samples; 0: the first score counts
};

struct Path {        // what the greedy loop writes
  int64_t* order;    // (steps)  the picks
  double* losses;    // (steps)  the loss after each
  double* gap;       // (steps)  the Frank-Wolfe gap after each, or null: not wanted
  int64_t length;    // picks made
  int64_t scored;    // candidates that were scored, the others being out of the question
  int64_t rescored;  // candidates scored again because rounding could have decided
};

struct Workspace {      // the loop's scratch
  int64_t* available;   // (N)
  double* scores;       // (N)
  double* errors;       // (N)
  int64_t* contenders;  // (N)
  int64_t* picked;      // (N)
  double* exchange;     // (2 N + 3)  with other processes; null where there are none
  int64_t ranks;        // how many processes, with this one
};

// Squared error through sums over the samples (README eq. 2). `scale` is 1 / (m C).
struct Quadratic {
  int64_t units;
  double scale;
  const double* norm;  // (N)  G_jj = |phi_j|^2
  const double* size;  // (N)  |phi_j|
  const double* beta;  // (N)  <phi_j, t>, t = target - bias
  double target_norm;  // |t|^2
  double rounding;     // the columns are known to this share of |phi_i| |phi_j|
  double* state;       // (N)  c_j = <phi_j, z>; zero on entry
  // With the features at hand, what rounding leaves open is scored again from them. Else null.
  const Features* features;
  const double* outgoing;    // (N, C)
  const double* target;      // (C, m)  t
  double* sum;               // (C, m)  z; zero on entry
  double* residual;          // (C, m)  scratch
  int64_t outputs;           // C
  const int64_t* all_units;  // (N)  0, 1, 2, ...
};

struct ColumnCache {
  double* columns;   // (capacity, N)  rows of G
  int64_t* slot_of;  // (N)  -1 on entry
  int64_t* unit_in;  // (capacity)  -1 on entry
  int64_t* wanted;   // (block)  the units that `fetch` has to bring
  int64_t capacity;  // at least block
  int64_t block;
  float* factor;  // (N, rank)  scratch, zero on entry: what is known of the missing columns
  int64_t rank;
  double* ahead;   // (N)  scratch
  int64_t* taken;  // (N)  scratch
};

// Any other loss, or squared error on mini-batches. Screening is in float32, deciding in float64.
struct Pointwise {
  Features features;
  const double* outgoing;  // (N, C)
  const double* bias;      // (C)
  Target<double> target;   // weight over all samples
  const double*
      linear;   // (C, m)  a term  sum_s <linear[:, s], f[:, s]>  added to the loss, or null
  double* sum;  // (C, m)  z; zero on entry
  const int64_t* starts;  // (steps) each step looks at samples [start, start + batch); null: at all
  int64_t batch;          // 0: all
  // Scratch, with b = batch or m:
  double* outputs64;     // (C, max(b, m))
  float* outputs32;      // (C, b)
  float* outgoing32;     // (N, C)
  float* weight32;       // like target.weight for b samples
  float* value32;        // (C, b) logistic
  double* linear_unit;   // (N)
  double* slopes;        // (N)
  double* slope_errors;  // (N)
  // For mini-batches only:
  double* weight_batch;  // like target.weight
  double* value_batch;   // (C, b)
  double* linear_batch;  // (C, b)
};

// Least squares on units of `width` features each, refitted in every step.
struct LeastSquares {
  int64_t units, width, outputs;  // N, w, C
  int64_t most;                   // distinct picks that there is room for
  double scale;                   // of the loss
  double target_norm;             // |t|^2
  const double* gram;             // (N w, N w)  <x_i, x_j>, with any damping on its diagonal
  double* right;                  // (N w, C)  <x_i, t>; on return those of the residual
  // Of the picked units in their order: gram = L L^T and L solved = right.
  double* factor;  // (N w, most w)  each unit's rows of L
  double* solved;  // (most w, C)
  int64_t* place;  // (N)  where in that order a unit is; -1: not picked
  // Scratch:
  double* rest;  // (N, w, w)
  double* root;  // (N, w, w)
  double* gain;  // (N)
};
constexpr int64_t kMostWidth = 512;

// Least squares on some kept units, some of which may be exchanged for dropped ones. A and B are
// its matrices swept on all the kept units (cpu/swap_gains.cpp).
struct Swaps {
  int64_t units, width, outputs;  // N, w, C
  const double* swept;            // (N w, N w)  A, symmetric
  const double* right;            // (N w, C)  B
  const double* norms;            // (N w)  the squares of the features
  const int64_t* kept;            // (kept_count)  the kept units that are tried
  const int64_t* dropped;         // (dropped_count)
  int64_t kept_count, dropped_count;
  const double* inner;  // (kept_count, w, w)  P = (-A_pp)^-1
  const double* pull;   // (kept_count, w, C)  P B_p
  const double* costs;  // (kept_count)  what dropping each costs
};
constexpr int64_t kMostSwapWidth = 64;

// Samples whose products are added up in the features' own type, as several sums that fill a
// register of at least 16 bytes.
constexpr int64_t kProductTile = 4096;

// One table an instruction set; every entry works on the CPU.
struct Kernels {
  // Activations as a layer computes them, hidden (n, units), into columns [at, at + n) of
  // features.data; adds their squares to `squares` and raises `largest`, to NaN where there is one.
  Status (*collect_features)(const Features& features, double* squares, double* largest,
                             const void* hidden, int64_t n, int64_t at, const Caller& caller);
  // squares and largest (units) of features that are there already.
  Status (*measure_features)(double* squares, double* largest, const Features& features,
                             const Caller& caller);
  // losses[i] = loss(base + shrink * phi_u), u = units[i]. For squared_error base is relative to
  // the targets, for cross_entropy to each sample's highest. Where errors is given, it receives a
  // bound of what rounding in Real can have done to losses[i].
  Status (*candidate_loss_f32)(double* losses,        // (n)
                               double* errors,        // (n) or null
                               const int64_t* units,  // (n)
                               int64_t n, const Features& features,
                               const float* outgoing,  // (N, C)
                               double shrink,
                               const float* base,  // (C, m)
                               const Target<float>& target, const Caller& caller);
  Status (*candidate_loss_f64)(double* losses, double* errors, const int64_t* units, int64_t n,
                               const Features& features, const double* outgoing, double shrink,
                               const double* base, const Target<double>& target,
                               const Caller& caller);
  // slopes[i] = <gradient, phi_u>, u = units[i]; errors as above.
  Status (*candidate_slope_f32)(double* slopes,        // (n)
                                double* errors,        // (n) or null
                                const int64_t* units,  // (n)
                                int64_t n, const Features& features,
                                const float* outgoing,  // (N, C)
                                const float* gradient,  // (C, m)
                                int64_t outputs, const Caller& caller);
  Status (*candidate_slope_f64)(double* slopes, double* errors, const int64_t* units, int64_t n,
                                const Features& features, const double* outgoing,
                                const double* gradient, int64_t outputs, const Caller& caller);
  // columns[i][j] = <phi_u, phi_j>, u = units[i].
  Status (*gram_columns)(double* columns,       // (n, N)
                         const int64_t* units,  // (n)
                         int64_t n, const Features& features,
                         const double* outgoing,  // (N, C)
                         int64_t outputs, const Caller& caller);
  // Every greedy step in one call, on the Gram matrix gram (N, N).
  Status (*greedy_gram)(Path& path, const double* gram, const Quadratic& objective,
                        const Rule& rule, const Workspace& workspace, const Caller& caller);
  // The same on columns of it, fetched in blocks when a picked unit's column is missing.
  Status (*greedy_columns)(Path& path, const ColumnCache& cache, const Quadratic& objective,
                           const Rule& rule, const Workspace& workspace, const Caller& caller);
  // The same by scoring the candidates' losses themselves.
  Status (*greedy_pointwise)(Path& path, const Pointwise& objective, const Rule& rule,
                             const Workspace& workspace, const Caller& caller);
  // Least squares, with the picked units' outgoing weights solved for again in every step.
  Status (*greedy_refit)(Path& path, const LeastSquares& problem, const Rule& rule,
                         const Workspace& workspace, const Caller& caller);
  // gains (kept_count, dropped_count): by what each exchange lowers the squared error.
  Status (*swap_gains)(double* gains, const Swaps& problem, const Caller& caller);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// The instruction sets that this build has and this processor runs, best first; null-terminated.
const char* const* instruction_sets();
// The table for one of them; null if it is not among them.
const Kernels* kernels_for(const char* instruction_set);

// The same on a GPU. Every pointer is the device's, but for Sampling::starts; `stream` is a
// cudaStream_t. Launchers return once the work is in the stream.
namespace cuda {

// A path that several calls make goes on where the last ended. On the device; zero at first.
struct Progress {
  int64_t length;    // picks made
  int64_t distinct;  // units among them
  int64_t missing;   // 1 + the unit whose column the next step needs; 0: none is missing
  int64_t done;      // nothing is left to pick, or enough is picked
  int64_t scored, rescored;
  double beta_sum, state_sum, reach;  // squared error: sums over the picks of beta, c, |phi|
  double loss, along, tangent_error;  // other losses: at the last step's outputs
  double slope_error;                 // what rounding does to <gradient, phi_j>, by |phi_j|
  double linear_sum;                  // over the picks: linear_unit
};

// How many sums a candidate's loss or slope on `samples` is added up from.
int64_t candidate_pieces(int64_t samples);

// As Kernels::candidate_loss_f64, without errors.
Status candidate_loss_f32(double* losses,   // (n)
                          double* partial,  // (n, candidate_pieces(m))  scratch
                          const int64_t* units, int64_t n, const Features& features,
                          const double* reach,    // (N) the largest |h_j w_jc| or more, or null
                          const float* outgoing,  // (N, C)
                          double shrink,
                          const float* base,  // (C, m)
                          const Target<float>& target, void* stream);
Status candidate_loss_f64(double* losses, double* partial, const int64_t* units, int64_t n,
                          const Features& features, const double* reach, const double* outgoing,
                          double shrink, const double* base, const Target<double>& target,
                          void* stream);
// As Kernels::candidate_slope_f64, without errors.
Status candidate_slope_f32(double* slopes, double* partial, const int64_t* units, int64_t n,
                           const Features& features, const float* outgoing, const float* gradient,
                           int64_t outputs, void* stream);
Status candidate_slope_f64(double* slopes, double* partial, const int64_t* units, int64_t n,
                           const Features& features, const double* outgoing, const double* gradient,
                           int64_t outputs, void* stream);

// Steps up to `last` in one launch, on the Gram matrix gram (N, N). Nothing is scored again from
// features: gram is float64's.
Status greedy_gram(Progress* progress, const Path& path, const double* gram,
                   const Quadratic& objective, const Rule& rule, const Workspace& workspace,
                   int64_t last, void* stream);
// The same on columns of it, until one is missing: unit j's is in row slot_of[j] of columns.
Status greedy_columns(Progress* progress, const Path& path, const double* columns,
                      const int64_t* slot_of, const Quadratic& objective, const Rule& rule,
                      const Workspace& workspace, int64_t last, void* stream);

// Any other loss, or squared error on mini-batches.
struct Pointwise {
  Features features;
  const double* outgoing;     // (N, C)
  const float* outgoing32;    // (N, C)
  const double* w_largest;    // (N)  the largest |w_jc|
  const double* w_sum;        // (N)  sum of |w_jc|
  const double* w_squares;    // (N)  sum of w_jc^2
  const double* reach;        // (N)  the largest |h_j w_jc|, or more
  const double* bias;         // (C)
  Target<double> target;      // weight over all samples
  const float* weight32;      // like target.weight
  const float* value32;       // (C, m) logistic
  double weights_norm;        // of the weights over samples and outputs
  const double* linear;       // (C, m)  as in the CPU's, or null
  const double* linear_unit;  // (N)
  const double* linear_bias;  // (1)  sum of bias_c linear_cs
  double linear_norm;         // of linear over samples and outputs
  double* sum;                // (C, m)  z; zero at first
  const int64_t* starts;      // (steps) on the host; null: every step looks at all samples
  int64_t batch;              // 0: all
  // Scratch:
  double* outputs64;  // (C, m)
  float* outputs32;   // (C, m)
  double* partial;    // (N, candidate_pieces(m))
  double* slopes;     // (N)
  double* bounds;     // (N)
  double* sums;       // (kSums, 4)
  int64_t* counts;    // (4)
};
constexpr int64_t kSums = 128;

// Steps first to last, without waiting for the device.
Status greedy_pointwise(Progress* progress, const Path& path, const Pointwise& objective,
                        const Rule& rule, const Workspace& workspace, int64_t first, int64_t last,
                        void* stream);

// The last CUDA error's name and text.
const char* last_error();
}  // namespace cuda

}  // namespace greedyprune
