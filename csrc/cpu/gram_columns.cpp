// Columns of the Gram matrix: columns[i][j] = <phi_units[i], phi_j> = (w_i . w_j) (h_i . h_j).
//
// The time of a product of all features with a few of them is that of reading the features once.
// The matrix products of libraries take twice as long. Sums over a tile of samples are in the
// features' own type, lane by lane, and these sums are added up in float64.
#include "gram_columns.h"

#include "../loss.h"
#include "lanes.h"
#include "parallel.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

constexpr int kUnits = 3, kColumns = kVectorBytes == 64 ? 8 : 3;  // their sums fill the registers
constexpr int kTogether = 24;                                     // units that share a tile in L1
constexpr int kMost = 64;                                         // columns at a time

// sums[u * kMost + i] += <h_u, wanted_i> over n samples.
template <class Feature>
void add_dots(double* sums, const Feature* const* h, const Feature* const* wanted, int64_t n) {
  using Vector = typename Lanes<Feature>::Vector;
  constexpr int64_t lanes = Lanes<Feature>::count;
  Vector sum[kUnits][kColumns] = {};
  int64_t s = 0;
  for (; s + lanes <= n; s += lanes) {
    Vector of_unit[kUnits];
    for (int u = 0; u < kUnits; ++u) of_unit[u] = load_lanes<Vector, true>(h[u] + s, lanes);
    for (int i = 0; i < kColumns; ++i) {
      const Vector other = load_lanes<Vector, true>(wanted[i] + s, lanes);
      for (int u = 0; u < kUnits; ++u) sum[u][i] += of_unit[u] * other;
    }
  }
  if (s < n) {
    for (int i = 0; i < kColumns; ++i) {
      const Vector other = load_lanes<Vector, false>(wanted[i] + s, n - s);
      for (int u = 0; u < kUnits; ++u)
        sum[u][i] += load_lanes<Vector, false>(h[u] + s, n - s) * other;
    }
  }
  for (int u = 0; u < kUnits; ++u)
    for (int i = 0; i < kColumns; ++i) sums[u * kMost + i] += sum_of(sum[u][i]);
}

template <class Feature>
Status columns_of(double* columns, const int64_t* units, int64_t n, const Features& features,
                  const double* outgoing, int64_t outputs, const Caller& caller) {
  const int64_t all = features.units, samples = features.samples;
  const Feature* data = static_cast<const Feature*>(features.data);
  const Feature* wanted[kMost + kColumns];  // the last one repeats
  for (int64_t i = 0; i < n + kColumns; ++i)
    wanted[i] = data + units[i < n ? i : n - 1] * features.stride;
  const bool finished =
      parallel_blocks(all, kTogether, samples * n, caller, [&](int64_t first, int64_t last) {
        double sums[(kTogether + kUnits) * kMost] = {0};
        for (int64_t s = 0; s < samples; s += kProductTile) {
          const int64_t count = s + kProductTile < samples ? kProductTile : samples - s;
          for (int64_t j = first; j < last; j += kUnits) {
            const Feature* h[kUnits];
            for (int64_t u = 0; u < kUnits; ++u)
              h[u] = data + (j + u < last ? j + u : last - 1) * features.stride + s;
            for (int64_t i = 0; i < n; i += kColumns) {
              const Feature* others[kColumns];
              for (int64_t c = 0; c < kColumns; ++c) others[c] = wanted[i + c] + s;
              double part[kUnits * kMost] = {0};
              add_dots(part, h, others, count);
              for (int64_t u = 0; u < kUnits; ++u)
                for (int64_t c = 0; c < kColumns && i + c < n; ++c)
                  sums[(j - first + u) * kMost + i + c] += part[u * kMost + c];
            }
          }
        }
        for (int64_t i = 0; i < n; ++i) {
          const double* w = outgoing + units[i] * outputs;
          for (int64_t j = first; j < last; ++j) {
            double weights = 0;  // w_i . w_j
            for (int64_t c = 0; c < outputs; ++c) weights += w[c] * outgoing[j * outputs + c];
            columns[i * all + j] = weights * sums[(j - first) * kMost + i];
          }
        }
      });
  return finished ? Status::ok : Status::stopped;
}

}  // namespace

// ---------------------------------------------------------------------------------------------

Status gram_columns(double* columns, const int64_t* units, int64_t n, const Features& features,
                    const double* outgoing, int64_t outputs, const Caller& caller) {
  const auto launch = features.type == Type::float32 ? columns_of<float> : columns_of<double>;
  for (int64_t i = 0; i < n; i += kMost) {
    const int64_t count = i + kMost < n ? kMost : n - i;
    const Status status =
        launch(columns + i * features.units, units + i, count, features, outgoing, outputs, caller);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
