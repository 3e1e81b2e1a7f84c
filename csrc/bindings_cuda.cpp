// The CUDA half's kernels. Nothing here waits for the device.
#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "bindings.h"
#include "cuda/plan.h"

namespace greedyprune {

using namespace pybind11::literals;

namespace {

void check(Status status) {
  if (status != Status::ok) throw std::runtime_error(std::string("CUDA: ") + cuda::last_error());
}

template <class Real, class Loss, class Slope>
void bind_candidates(py::module_& m, const std::string& suffix, Loss loss, Slope slope) {
  m.def(("cuda_candidate_loss_" + suffix).c_str(),
        [loss](Address losses, Address partial, Address units, int64_t n, const Features& features,
               Address reach, Address outgoing, double shrink, Address base,
               const Target<Real>& target, Address stream) {
          check(loss(at<double>(losses), at<double>(partial), at<const int64_t>(units), n, features,
                     at<const double>(reach), at<const Real>(outgoing), shrink,
                     at<const Real>(base), target, at<void>(stream)));
        });
  m.def(
      ("cuda_candidate_slope_" + suffix).c_str(),
      [slope](Address slopes, Address partial, Address units, int64_t n, const Features& features,
              Address outgoing, Address gradient, int64_t outputs, Address stream) {
        check(slope(at<double>(slopes), at<double>(partial), at<const int64_t>(units), n, features,
                    at<const Real>(outgoing), at<const Real>(gradient), outputs, at<void>(stream)));
      });
}

void bind_pointwise(py::module_& m) {
  using P = cuda::Pointwise;
  bind_struct(m, "CudaPointwise", FIELD(P, features), FIELD(P, outgoing), FIELD(P, outgoing32),
              FIELD(P, w_largest), FIELD(P, w_sum), FIELD(P, w_squares), FIELD(P, reach),
              FIELD(P, bias), FIELD(P, target), FIELD(P, weight32), FIELD(P, value32),
              FIELD(P, weights_norm), FIELD(P, linear), FIELD(P, linear_unit),
              FIELD(P, linear_bias), FIELD(P, linear_norm), FIELD(P, sum), FIELD(P, starts),
              FIELD(P, batch), FIELD(P, outputs64), FIELD(P, outputs32), FIELD(P, partial),
              FIELD(P, slopes), FIELD(P, bounds), FIELD(P, sums), FIELD(P, counts));
}

// The places of the numbers that Python reads, in a Progress taken as 64-bit integers.
py::dict progress_places() {
  using P = cuda::Progress;
  static_assert(std::is_standard_layout_v<P> && sizeof(P) % sizeof(int64_t) == 0);
  const auto place = [](size_t offset) { return static_cast<int64_t>(offset / sizeof(int64_t)); };
  return py::dict("length"_a = place(offsetof(P, length)),
                  "missing"_a = place(offsetof(P, missing)), "done"_a = place(offsetof(P, done)),
                  "scored"_a = place(offsetof(P, scored)),
                  "rescored"_a = place(offsetof(P, rescored)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  using cuda::Progress;
  m.attr("cuda_progress_size") = static_cast<int64_t>(sizeof(Progress));
  m.attr("cuda_progress_places") = progress_places();
  m.attr("cuda_sums") = cuda::kSums;
  m.def("cuda_candidate_pieces", cuda::candidate_pieces);
  bind_candidates<float>(m, "f32", cuda::candidate_loss_f32, cuda::candidate_slope_f32);
  bind_candidates<double>(m, "f64", cuda::candidate_loss_f64, cuda::candidate_slope_f64);
  bind_pointwise(m);
  m.def("cuda_greedy_gram",
        [](Address progress, const Path& path, Address gram, const Quadratic& objective,
           const Rule& rule, const Workspace& workspace, int64_t last, Address stream) {
          check(cuda::greedy_gram(at<Progress>(progress), path, at<const double>(gram), objective,
                                  rule, workspace, last, at<void>(stream)));
        });
  m.def("cuda_greedy_columns", [](Address progress, const Path& path, Address columns,
                                  Address slot_of, const Quadratic& objective, const Rule& rule,
                                  const Workspace& workspace, int64_t last, Address stream) {
    check(cuda::greedy_columns(at<Progress>(progress), path, at<const double>(columns),
                               at<const int64_t>(slot_of), objective, rule, workspace, last,
                               at<void>(stream)));
  });
  m.def("cuda_greedy_pointwise",
        [](Address progress, const Path& path, const cuda::Pointwise& objective, const Rule& rule,
           const Workspace& workspace, int64_t first, int64_t last, Address stream) {
          check(cuda::greedy_pointwise(at<Progress>(progress), path, objective, rule, workspace,
                                       first, last, at<void>(stream)));
        });
  // How work is laid out, for the tests.
  m.def("cuda_pieces_of", [](int64_t samples) {
    const Pieces pieces = pieces_of(samples);
    return py::make_tuple(pieces.count, pieces.size);
  });
  m.def("cuda_blocks_of", blocks_of);
}

}  // namespace greedyprune
