// The drop of the squared error of least squares when a kept unit is exchanged for a dropped one.
//
// A and B are the Gram matrix K and the right side R, swept on the kept units S (D: the others):
//
//     A_SS = -K_SS^-1    A_SD = K_SS^-1 K_SD    A_DD = K_DD - K_DS K_SS^-1 K_SD
//     B_S = K_SS^-1 R_S                         B_D = R_D - K_DS K_SS^-1 R_S
//
// With P = (-A_pp)^-1 for the kept unit p, exchanging it for unit j lowers the error by
//
//     tr( r^T s^-1 r ) - tr( B_p^T P B_p ),    s = A_jj + A_pj^T P A_pj,    r = B_j + A_pj^T P B_p.
#include "swap_gains.h"

#include <cmath>

#include "lanes.h"
#include "parallel.h"

namespace greedyprune {
namespace GREEDYPRUNE_ISA {
namespace {

using Vector = Lanes<double>::Vector;
constexpr int64_t kLanes = Lanes<double>::count;

Vector row_part(const double* row, int64_t at, int64_t end) {
  return at + kLanes <= end ? load_lanes<Vector, true>(row + at, kLanes)
                            : load_lanes<Vector, false>(row + at, end - at);
}

}  // namespace

// ---------------------------------------------------------------------------------------------

Status swap_gains(double* gains, const Swaps& p, const Caller& caller) {
  const int64_t w = p.width, size = p.units * w, outputs = p.outputs;
  if (w > kMostSwapWidth) return Status::bad_argument;
  const auto swept = [&](int64_t i, int64_t a, int64_t j, int64_t b) {
    return p.swept[(i * w + a) * size + j * w + b];
  };
  const bool finished = parallel_blocks(
      p.dropped_count, 1, p.kept_count * w * w * (outputs + w), caller,
      [&](int64_t first, int64_t last) {
        double root[kMostSwapWidth * kMostSwapWidth];
        Vector y[kMostSwapWidth];
        for (int64_t d = first; d < last; ++d) {
          const int64_t j = p.dropped[d];
          for (int64_t q = 0; q < p.kept_count; ++q) {
            const int64_t kept = p.kept[q];
            const double* inner = p.inner + q * w * w;      // P
            const double* pull = p.pull + q * w * outputs;  // P B_p
            double across[kMostSwapWidth];                  // a row of A_pj^T P
            for (int64_t a = 0; a < w; ++a) {
              for (int64_t b = 0; b < w; ++b) {
                across[b] = 0;
                for (int64_t c = 0; c < w; ++c)
                  across[b] += swept(kept, c, j, a) * inner[c * w + b];
              }
              for (int64_t b = 0; b <= a; ++b) {
                double left = swept(j, a, j, b);
                for (int64_t c = 0; c < w; ++c) left += across[c] * swept(kept, c, j, b);
                for (int64_t c = 0; c < b; ++c) left -= root[a * w + c] * root[b * w + c];
                const double pivot = root[b * w + b];
                if (b < a)
                  root[a * w + b] = pivot > 0 ? left / pivot : 0;
                else
                  root[a * w + a] = left > kDependent * p.norms[j * w + a] ? std::sqrt(left) : 0;
              }
            }
            Vector total = {};
            for (int64_t c = 0; c < outputs; c += kLanes) {
              for (int64_t a = 0; a < w; ++a) {
                y[a] = row_part(p.right + (j * w + a) * outputs, c, outputs);
                for (int64_t b = 0; b < w; ++b)
                  y[a] += swept(kept, b, j, a) * row_part(pull + b * outputs, c, outputs);
                for (int64_t b = 0; b < a; ++b) y[a] -= root[a * w + b] * y[b];
                const double pivot = root[a * w + a];
                y[a] *= pivot > 0 ? 1 / pivot : 0;
                total += y[a] * y[a];
              }
            }
            gains[q * p.dropped_count + d] = sum_of(total) - p.costs[q];
          }
        }
      });
  return finished ? Status::ok : Status::stopped;
}

}  // namespace GREEDYPRUNE_ISA
}  // namespace greedyprune
