// The interface between Python and the compiled kernels: types, shapes, launchers.
//
// Notation (docs/how-it-works.md): N units, m samples, C outputs. Unit j adds
// phi_j(s) = h_j(s) * w_j to the outputs, with h the features and w the outgoing weights
// (already scaled by N, the papers' mean-field scaling). A greedy step k picks
//
//     i_k = argmin_j  L( b + (z + phi_j) / k ),   z = sum of the phi picked so far.        (1)
//
// 1 / k is called `shrink`. Rules: plain pointers and 64-bit sizes; outputs first; the caller owns
// all memory, scratch included; kernels never allocate and never throw.
#pragma once

#include <cstdint>

namespace greedyprune {

enum class Status : int32_t { ok = 0, stopped = 1, bad_argument = 2, device_error = 3 };
enum class Loss : int32_t { squared_error = 0, cross_entropy = 1, logistic = 2 };
// Types of features. Those of 16 bits are for CUDA alone.
enum class Type : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// A feature (a column of a Gram matrix) is dependent if less than this share of its squared norm is
// left after projecting out the features before it: that much is rounding error.
// greedyprune/kernels/least_squares.py has the same number.
constexpr double kDependent = 1e-10;

struct Features {    // the units' activations, unit-major
  const void* data;  // (units, samples), rows `stride` elements apart
  Type type;
  int64_t units, samples, stride;
  const double* squares;  // (units) an upper bound of each row's sum of squares
  const double* largest;  // (units) an upper bound of each row's largest magnitude
};

// What the outputs f (C, m) are compared with:
//   loss(f) = scale * sum_s weight_s * l(f[:, s]),
// where the sum goes over the outputs, too, if l is elementwise (logistic, squared_error).
template <class Real>
struct Target {
  Loss loss;
  int64_t outputs;       // C
  const Real* value;     // (C, m)  logistic: the targets in [0, 1]; else null
  const int32_t* label;  // (m)     cross_entropy: the classes in [0, C); else null
  const Real* weight;    // (m) cross_entropy, (C, m) logistic and squared_error; null: ones
  double scale;
};

// How a kernel reaches its caller. The functions run on the calling thread only. Where one returns
// nonzero, the kernel ends with Status::stopped.
struct Caller {
  void* self;
  int (*poll)(void* self);                                        // every 50 ms or so
  int (*step)(void* self, int64_t k, int64_t unit, double loss);  // after each greedy step
  // Computes the Gram columns of wanted[0:count] into rows [slot, slot + count) of the cache.
  int (*fetch)(void* self, int64_t slot, int64_t count);
  // Adds up workspace.exchange[0:count] over the processes that the samples are spread over.
  // `picks` is a number for the picks so far: the processes can tell that theirs are the same.
  int (*sum)(void* self, int64_t count, uint32_t picks);
  int32_t threads;
};

// When the greedy loop stops and which units it may pick.
struct Rule {
  int64_t steps;        // the most picks
  int64_t size;         // stop when this many distinct units are picked
  bool replacement;     // may a unit be picked again?
  int64_t candidates;   // random candidates a step; 0: every unit
  const double* draws;  // (steps, candidates) uniform in [0, 1), or null
  int64_t shortlist;    // for mini-batches: this many of the best candidates are scored again on
                        // all samples, and this score decides; 0: the first score decides
};

struct Path {        // what the greedy loop writes
  int64_t* order;    // (steps)  the picks
  double* losses;    // (steps)  the loss after each
  double* gap;       // (steps)  the Frank-Wolfe gap after each, or null: not wanted
  int64_t length;    // picks made
  int64_t scored;    // candidates that were scored; bounds ruled the others out
  int64_t rescored;  // candidates scored again because rounding could have decided
};

// The loss at the outputs u of a step: where a lower bound of the next losses starts (tangent.h).
struct Tangent {
  double loss;   // L(u)
  double along;  // <L'(u), u - b>
  double error;  // bound on the rounding error of these two together
};

struct Workspace {      // the greedy loop's scratch
  int64_t* available;   // (N)
  double* scores;       // (N)
  double* errors;       // (N)
  int64_t* contenders;  // (N)
  int64_t* picked;      // (N)
  double* exchange;     // (2 N + 3)  what is added up over the processes; null for one process
  int64_t ranks;        // the number of processes
};

// Squared error through sums over the samples (eq. (2)). `scale` is 1 / (m C).
struct Quadratic {
  int64_t units;
  double scale;
  const double* gram_diagonal;  // (N)  G_jj = |phi_j|^2
  const double* phi_norm;       // (N)  |phi_j|
  const double* beta;           // (N)  <phi_j, t>, t = target - bias
  double target_norm;           // |t|^2
  double rounding;              // bound on the error of G_ij, relative to |phi_i| |phi_j|
  double* state;                // (N)  c_j = <phi_j, z>; zero on entry
  // The features, to score candidates again that the bounds on rounding cannot tell apart. Null: no
  // features; then the fields below are null, too.
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
  float* factor;  // (rank, N)  scratch: an approximation of the missing columns
  int64_t rank;
  double* ahead;   // (N)  scratch
  int64_t* taken;  // (N)  scratch
};

// Any other loss, or squared error on mini-batches. Candidates are screened in float32; float64
// decides.
struct Pointwise {
  Features features;
  const double* outgoing;  // (N, C)
  const double* bias;      // (C)
  Target<double> target;   // weight over all samples
  // (C, m)  sum_s <linear[:, s], f[:, s]> is added to the loss; or null
  const double* linear;
  double* sum;            // (C, m)  z; zero on entry
  const int64_t* starts;  // (steps) a step scores on samples [start, start + batch); null: on all
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

// One consumer's least squares, for N units of `width` features each.
struct LeastSquares {
  int64_t width, outputs;  // w, C
  const double* gram;      // (N w, N w)  <x_i, x_j>, with any damping on its diagonal
  double* right;           // (N w, C)  <x_i, t>; on return those of the residual
  // For the picked units in their order: gram = L L^T and L solved = right.
  double* factor;  // (N w, most w)  each unit's rows of L; zero on entry
  double* solved;  // (most w, C); zero on entry
  // Scratch:
  double* rest;  // (N, w, w)
  double* root;  // (N, w, w)
};
constexpr int64_t kMostWidth = 512;

// All consumers' least squares, refitted in every step. Their squared errors add up.
struct Refit {
  int64_t units, most;  // N, the most distinct picks
  double scale;         // of the loss
  double target_norm;   // the sum of |t|^2 over the consumers
  int64_t* place;       // (N)  a unit's place in the order of the picks; -1: not picked
  double* gain;         // (N)  scratch
};

// Least squares on kept units, one of which may be exchanged for a dropped one. A and B are its
// matrices swept on all the kept units (cpu/swap_gains.cpp).
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
  const double* costs;  // (kept_count)  by how much dropping each raises the error
};
constexpr int64_t kMostSwapWidth = 64;

// Samples whose products are added up in the features' own type, in lanes that fill a register of
// at least 16 bytes. greedyprune/kernels/products.py has the same number, and bounds the rounding.
constexpr int64_t kProductTile = 4096;

// One table an instruction set; every entry works on the CPU.
struct Kernels {
  // Writes activations as a layer computes them into columns [first_sample, first_sample + n) of
  // data, whose rows are `stride` elements apart. Adds their squares to `squares` and raises
  // `largest` to their magnitudes; a NaN stays there.
  Status (*collect_features)(void* data,          // (units, samples)
                             double* squares,     // (units)
                             double* largest,     // (units)
                             const void* hidden,  // (n, units)
                             Type type, int64_t units, int64_t n, int64_t stride,
                             int64_t first_sample, const Caller& caller);
  // squares and largest (units) of features that are collected already.
  Status (*measure_features)(double* squares, double* largest, const Features& features,
                             const Caller& caller);
  // losses[i] = loss(base + shrink * phi_u), u = units[i]. For squared_error the target is
  // subtracted from base already, for cross_entropy each sample's highest output is. Where errors
  // is given, it receives bounds on the error that rounding in Real causes in losses.
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
  // The same on columns of the Gram matrix, fetched in blocks if a picked unit's column is missing.
  Status (*greedy_columns)(Path& path, const ColumnCache& cache, const Quadratic& objective,
                           const Rule& rule, const Workspace& workspace, const Caller& caller);
  // The same by scoring the candidates' losses themselves.
  Status (*greedy_pointwise)(Path& path, const Pointwise& objective, const Rule& rule,
                             const Workspace& workspace, const Caller& caller);
  // Least squares, with the picked units' outgoing weights solved for again in every step.
  Status (*greedy_refit)(Path& path, const Refit& refit, const LeastSquares* parts, int64_t count,
                         const Rule& rule, const Workspace& workspace, const Caller& caller);
  // gains (kept_count, dropped_count): by how much each exchange lowers the squared error.
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

// The same on a GPU. Every pointer is the device's, except Pointwise::starts; `stream` is a
// cudaStream_t. Launchers return once the work is in the stream.
namespace cuda {

// Several calls make a path: each goes on where the last ended. On the device; zero at first.
struct Progress {
  int64_t length;            // picks made
  int64_t distinct;          // distinct units among them
  int64_t missing;           // 1 + the unit whose column the next step needs; 0: none is missing
  int64_t done;              // 1: no unit can be picked, or the rule asks for no more
  int64_t scored, rescored;  // as in Path
  // Squared error: sums over the picks of beta, c and |phi|.
  double beta_sum, state_sum, phi_norm_sum;
  // Other losses: the tangent at the last step, a bound on the error of a slope relative to
  // |phi_j|, and the sum of linear_unit over the picks.
  Tangent tangent;
  double slope_error;
  double linear_sum;
};

// The number of partial sums of a candidate's loss or slope on `samples` samples.
int64_t candidate_pieces(int64_t samples);

// As Kernels::candidate_loss_f64, without errors.
Status candidate_loss_f32(double* losses,   // (n)
                          double* partial,  // (n, candidate_pieces(m))  scratch
                          const int64_t* units, int64_t n, const Features& features,
                          const double* reach,    // (N) an upper bound of |h_j w_jc|, or null
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

// Steps up to `last` in one launch, on the Gram matrix gram (N, N). Candidates are not scored
// again from features: gram is float64.
Status greedy_gram(Progress* progress, const Path& path, const double* gram,
                   const Quadratic& objective, const Rule& rule, const Workspace& workspace,
                   int64_t last, void* stream);
// The same on columns of the Gram matrix, until one is missing. Unit j's is row slot_of[j] of
// columns.
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
  const double* reach;        // (N)  an upper bound of |h_j w_jc|
  const double* bias;         // (C)
  Target<double> target;      // weight over all samples
  const float* weight32;      // like target.weight
  const float* value32;       // (C, m) logistic
  double weights_norm;        // norm of the weights over samples and outputs
  const double* linear;       // (C, m)  as in the CPU's, or null
  const double* linear_unit;  // (N)  <linear, phi_j>, or null
  const double* linear_bias;  // (1)  sum of bias_c linear_cs, or null
  double linear_norm;         // norm of linear over samples and outputs
  double* sum;                // (C, m)  z; zero at first
  const int64_t* starts;      // (steps) on the host; null: every step scores on all samples
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
