// Collects the features unit by unit while the model runs, and measures them.
#include "features.h"

#include <cmath>

#include "../loss.h"
#include "lanes.h"
#include "parallel.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

constexpr int64_t kBlock = 64;  // units, and samples, that are transposed in L1 at a time

// Adds the squares of n numbers in float64, and raises *largest to the largest magnitude.
template <class Feature>
void measure(double* squares, double* largest, const Feature* row, int64_t n) {
  using Vector = typename Lanes<double>::Vector;
  constexpr int64_t lanes = Lanes<double>::count;
  Vector sum = {}, high = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const Vector h = load_lanes<Vector, true>(row + i, lanes);
    sum += h * h;
    high = farther(high, h);
  }
  if (i < n) {
    const Vector h = load_lanes<Vector, false>(row + i, n - i);
    sum += h * h;
    high = farther(high, h);
  }
  *squares += sum_of(sum);
  for (int lane = 0; lane < lanes; ++lane)
    if (high[lane] > *largest || std::isnan(high[lane])) *largest = high[lane];  // NaN stays
}

template <class Feature>
Status collect(Feature* data, double* squares, double* largest, const Feature* hidden,
               int64_t units, int64_t n, int64_t stride, int64_t first_sample,
               const Caller& caller) {
  const bool finished =
      parallel_blocks(units, kBlock, 4 * n, caller, [&](int64_t first, int64_t last) {
        Feature block[kBlock][kBlock];
        for (int64_t s = 0; s < n; s += kBlock) {
          const int64_t count = s + kBlock < n ? kBlock : n - s;
          for (int64_t i = 0; i < count; ++i)
            for (int64_t j = first; j < last; ++j)
              block[j - first][i] = hidden[(s + i) * units + j];
          for (int64_t j = first; j < last; ++j) {
            memcpy(data + j * stride + first_sample + s, block[j - first],
                   static_cast<size_t>(count) * sizeof(Feature));
            measure(squares + j, largest + j, block[j - first], count);
          }
        }
      });
  return finished ? Status::ok : Status::stopped;
}

}  // namespace

// ---------------------------------------------------------------------------------------------

Status collect_features(void* data, double* squares, double* largest, const void* hidden, Type type,
                        int64_t units, int64_t n, int64_t stride, int64_t first_sample,
                        const Caller& caller) {
  if (type == Type::float32)
    return collect(static_cast<float*>(data), squares, largest, static_cast<const float*>(hidden),
                   units, n, stride, first_sample, caller);
  return collect(static_cast<double*>(data), squares, largest, static_cast<const double*>(hidden),
                 units, n, stride, first_sample, caller);
}

Status measure_features(double* squares, double* largest, const Features& features,
                        const Caller& caller) {
  const bool finished = parallel_blocks(
      features.units, 8, features.samples, caller, [&](int64_t first, int64_t last) {
        for (int64_t j = first; j < last; ++j) {
          squares[j] = largest[j] = 0;
          for (int64_t s = 0; s < features.samples; s += kTile) {
            const int64_t n = s + kTile < features.samples ? kTile : features.samples - s;
            const int64_t offset = j * features.stride + s;
            if (features.type == Type::float32)
              measure(squares + j, largest + j, static_cast<const float*>(features.data) + offset,
                      n);
            else
              measure(squares + j, largest + j, static_cast<const double*>(features.data) + offset,
                      n);
          }
        }
      });
  return finished ? Status::ok : Status::stopped;
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
