// The CUDA half's kernels. Nothing here waits for the device.
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda/plan.h"

namespace greedyprune {
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
  py::class_<P> pointwise(m, "CudaPointwise", py::module_local());
  pointwise.def(py::init<>())
      .def_readwrite("features", &P::features)
      .def_readwrite("target", &P::target)
      .def_readwrite("weights_norm", &P::weights_norm)
      .def_readwrite("linear_norm", &P::linear_norm)
      .def_readwrite("batch", &P::batch);
  pointer(pointwise, "outgoing", &P::outgoing);
  pointer(pointwise, "outgoing32", &P::outgoing32);
  pointer(pointwise, "w_largest", &P::w_largest);
  pointer(pointwise, "w_sum", &P::w_sum);
  pointer(pointwise, "w_squares", &P::w_squares);
  pointer(pointwise, "reach", &P::reach);
  pointer(pointwise, "bias", &P::bias);
  pointer(pointwise, "weight32", &P::weight32);
  pointer(pointwise, "value32", &P::value32);
  pointer(pointwise, "linear", &P::linear);
  pointer(pointwise, "linear_unit", &P::linear_unit);
  pointer(pointwise, "linear_bias", &P::linear_bias);
  pointer(pointwise, "sum", &P::sum);
  pointer(pointwise, "starts", &P::starts);
  pointer(pointwise, "outputs64", &P::outputs64);
  pointer(pointwise, "outputs32", &P::outputs32);
  pointer(pointwise, "partial", &P::partial);
  pointer(pointwise, "slopes", &P::slopes);
  pointer(pointwise, "bounds", &P::bounds);
  pointer(pointwise, "sums", &P::sums);
  pointer(pointwise, "counts", &P::counts);
}

}  // namespace

void bind_cuda(py::module_& m) {
  using cuda::Progress;
  m.attr("cuda_progress_size") = static_cast<int64_t>(sizeof(Progress));
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
