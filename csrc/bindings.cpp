// The module and the CPU's kernels.
#include "bindings.h"

#include <chrono>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

using namespace greedyprune;
using namespace pybind11::literals;

namespace {

const char* active_name = instruction_sets()[0];
const Kernels* active = kernels_for(active_name);

// The Python callbacks behind a Caller. An exception ends the kernel and is raised after its end.
class PythonCaller {
 public:
  PythonCaller(int threads, py::object step, py::object fetch, py::object sum)
      : step_(std::move(step)), fetch_(std::move(fetch)), sum_(std::move(sum)) {
    caller = {this,
              poll,
              this->step,
              fetch_.is_none() ? nullptr : this->fetch,
              sum_.is_none() ? nullptr : this->sum,
              threads};
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

  Caller caller;

 private:
  template <class Body>
  int guarded(const Body& body) {
    py::gil_scoped_acquire gil;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return body() ? 1 : 0;
    } catch (...) {
      error_ = std::current_exception();
      return 1;
    }
  }

  static int poll(void* self) {
    return static_cast<PythonCaller*>(self)->guarded([] { return false; });
  }

  static int step(void* self, int64_t k, int64_t unit, double loss) {
    auto* caller = static_cast<PythonCaller*>(self);
    if (caller->step_.is_none()) {  // look for Ctrl-C, but not after every step of a microsecond
      const auto now = std::chrono::steady_clock::now();
      if (now - caller->asked_ < std::chrono::milliseconds(50)) return 0;
      caller->asked_ = now;
      return poll(self);
    }
    return caller->guarded([&] { return caller->step_(k, unit, loss).cast<bool>(); });
  }

  static int fetch(void* self, int64_t slot, int64_t count) {
    auto* caller = static_cast<PythonCaller*>(self);
    return caller->guarded([&] {
      caller->fetch_(slot, count);
      return false;
    });
  }

  static int sum(void* self, int64_t count, uint32_t picks) {
    auto* caller = static_cast<PythonCaller*>(self);
    return caller->guarded([&] {
      caller->sum_(count, picks);
      return false;
    });
  }

  py::object step_, fetch_, sum_;
  std::exception_ptr error_;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
};

void check(Status status, const PythonCaller& caller) {
  caller.rethrow();
  if (status == Status::bad_argument) throw std::invalid_argument("bad argument for a kernel");
  if (status == Status::device_error) throw std::runtime_error("a device kernel failed");
}

// Runs a kernel without the interpreter lock and raises what went wrong.
template <class Kernel>
void run(int threads, py::object step, py::object fetch, py::object sum, const Kernel& kernel) {
  PythonCaller caller(threads, std::move(step), std::move(fetch), std::move(sum));
  Status status;
  {
    py::gil_scoped_release release;
    status = kernel(caller.caller);
  }
  check(status, caller);
}

template <class Kernel>
void run(int threads, const Kernel& kernel) {
  run(threads, py::none(), py::none(), py::none(), kernel);
}

template <class Real>
void bind_target(py::module_& m, const char* name) {
  using T = Target<Real>;
  bind_struct(m, name, FIELD(T, loss), FIELD(T, outputs), FIELD(T, value), FIELD(T, label),
              FIELD(T, weight), FIELD(T, scale));
}

void bind_structs(py::module_& m) {
  m.attr("TYPES") = py::dict("float32"_a = static_cast<int>(Type::float32),
                             "float64"_a = static_cast<int>(Type::float64),
                             "bfloat16"_a = static_cast<int>(Type::bfloat16),
                             "float16"_a = static_cast<int>(Type::float16));
  m.attr("LOSSES") = py::dict("squared_error"_a = static_cast<int>(Loss::squared_error),
                              "cross_entropy"_a = static_cast<int>(Loss::cross_entropy),
                              "logistic"_a = static_cast<int>(Loss::logistic));
  bind_struct(m, "Features", FIELD(Features, data), FIELD(Features, type), FIELD(Features, units),
              FIELD(Features, samples), FIELD(Features, stride), FIELD(Features, squares),
              FIELD(Features, largest));
  bind_target<float>(m, "TargetF32");
  bind_target<double>(m, "TargetF64");
  bind_struct(m, "Rule", FIELD(Rule, steps), FIELD(Rule, size), FIELD(Rule, replacement),
              FIELD(Rule, candidates), FIELD(Rule, draws), FIELD(Rule, shortlist));
  bind_struct(m, "Path", FIELD(Path, order), FIELD(Path, losses), FIELD(Path, gap),
              FIELD(Path, length), FIELD(Path, scored), FIELD(Path, rescored));
  bind_struct(m, "Workspace", FIELD(Workspace, available), FIELD(Workspace, scores),
              FIELD(Workspace, errors), FIELD(Workspace, contenders), FIELD(Workspace, picked),
              FIELD(Workspace, exchange), FIELD(Workspace, ranks));
  bind_struct(m, "Quadratic", FIELD(Quadratic, units), FIELD(Quadratic, scale),
              FIELD(Quadratic, gram_diagonal), FIELD(Quadratic, phi_norm), FIELD(Quadratic, beta),
              FIELD(Quadratic, target_norm), FIELD(Quadratic, rounding), FIELD(Quadratic, state),
              FIELD(Quadratic, features), FIELD(Quadratic, outgoing), FIELD(Quadratic, target),
              FIELD(Quadratic, sum), FIELD(Quadratic, residual), FIELD(Quadratic, outputs),
              FIELD(Quadratic, all_units));
  bind_struct(m, "ColumnCache", FIELD(ColumnCache, columns), FIELD(ColumnCache, slot_of),
              FIELD(ColumnCache, unit_in), FIELD(ColumnCache, wanted), FIELD(ColumnCache, capacity),
              FIELD(ColumnCache, block), FIELD(ColumnCache, factor), FIELD(ColumnCache, rank),
              FIELD(ColumnCache, ahead), FIELD(ColumnCache, taken));
  using P = Pointwise;
  bind_struct(m, "Pointwise", FIELD(P, features), FIELD(P, outgoing), FIELD(P, bias),
              FIELD(P, target), FIELD(P, linear), FIELD(P, sum), FIELD(P, starts), FIELD(P, batch),
              FIELD(P, outputs64), FIELD(P, outputs32), FIELD(P, outgoing32), FIELD(P, weight32),
              FIELD(P, value32), FIELD(P, linear_unit), FIELD(P, slopes), FIELD(P, slope_errors),
              FIELD(P, weight_batch), FIELD(P, value_batch), FIELD(P, linear_batch));
  using S = LeastSquares;
  bind_struct(m, "LeastSquares", FIELD(S, width), FIELD(S, outputs), FIELD(S, gram),
              FIELD(S, right), FIELD(S, factor), FIELD(S, solved), FIELD(S, rest), FIELD(S, root));
  bind_struct(m, "Refit", FIELD(Refit, units), FIELD(Refit, most), FIELD(Refit, scale),
              FIELD(Refit, target_norm), FIELD(Refit, place), FIELD(Refit, gain));
  bind_struct(m, "Swaps", FIELD(Swaps, units), FIELD(Swaps, width), FIELD(Swaps, outputs),
              FIELD(Swaps, swept), FIELD(Swaps, right), FIELD(Swaps, norms), FIELD(Swaps, kept),
              FIELD(Swaps, dropped), FIELD(Swaps, kept_count), FIELD(Swaps, dropped_count),
              FIELD(Swaps, inner), FIELD(Swaps, pull), FIELD(Swaps, costs));
}

// One binding for both types of Real; `kernel` is the table's entry.
template <class Real, class Entry>
void bind_candidate_kernels(py::module_& m, const std::string& suffix, Entry loss_entry,
                            Status (*Kernels::*slope_entry)(double*, double*, const int64_t*,
                                                            int64_t, const Features&, const Real*,
                                                            const Real*, int64_t, const Caller&)) {
  m.def(("candidate_loss_" + suffix).c_str(),
        [loss_entry](Address losses, Address errors, Address units, int64_t n,
                     const Features& features, Address outgoing, double shrink, Address base,
                     const Target<Real>& target, int threads) {
          run(threads, [&](const Caller& caller) {
            return (active->*loss_entry)(
                at<double>(losses), at<double>(errors), at<const int64_t>(units), n, features,
                at<const Real>(outgoing), shrink, at<const Real>(base), target, caller);
          });
        });
  m.def(("candidate_slope_" + suffix).c_str(),
        [slope_entry](Address slopes, Address errors, Address units, int64_t n,
                      const Features& features, Address outgoing, Address gradient, int64_t outputs,
                      int threads) {
          run(threads, [&](const Caller& caller) {
            return (active->*slope_entry)(
                at<double>(slopes), at<double>(errors), at<const int64_t>(units), n, features,
                at<const Real>(outgoing), at<const Real>(gradient), outputs, caller);
          });
        });
}

void bind_features(py::module_& m) {
  m.def("collect_features", [](Address data, Address squares, Address largest, Address hidden,
                               int type, int64_t units, int64_t n, int64_t stride,
                               int64_t first_sample, int threads) {
    run(threads, [&](const Caller& caller) {
      return active->collect_features(at<void>(data), at<double>(squares), at<double>(largest),
                                      at<const void>(hidden), static_cast<Type>(type), units, n,
                                      stride, first_sample, caller);
    });
  });
  m.def("measure_features", [](Address squares, Address largest, const Features& features,
                               int threads) {
    run(threads, [&](const Caller& caller) {
      return active->measure_features(at<double>(squares), at<double>(largest), features, caller);
    });
  });
}

void bind_greedy(py::module_& m) {
  m.attr("product_tile") = kProductTile;
  m.def("gram_columns", [](Address columns, Address units, int64_t n, const Features& features,
                           Address outgoing, int64_t outputs, int threads) {
    run(threads, [&](const Caller& caller) {
      return active->gram_columns(at<double>(columns), at<const int64_t>(units), n, features,
                                  at<const double>(outgoing), outputs, caller);
    });
  });
  m.def("greedy_gram", [](Path& path, Address gram, const Quadratic& objective, const Rule& rule,
                          const Workspace& workspace, int threads, py::object step,
                          py::object sum) {
    run(threads, std::move(step), py::none(), std::move(sum), [&](const Caller& caller) {
      return active->greedy_gram(path, at<const double>(gram), objective, rule, workspace, caller);
    });
  });
  m.def("greedy_columns", [](Path& path, const ColumnCache& cache, const Quadratic& objective,
                             const Rule& rule, const Workspace& workspace, int threads,
                             py::object step, py::object sum, py::object fetch) {
    run(threads, std::move(step), std::move(fetch), std::move(sum), [&](const Caller& caller) {
      return active->greedy_columns(path, cache, objective, rule, workspace, caller);
    });
  });
  m.def("greedy_pointwise",
        [](Path& path, const Pointwise& objective, const Rule& rule, const Workspace& workspace,
           int threads, py::object step, py::object sum) {
          run(threads, std::move(step), py::none(), std::move(sum), [&](const Caller& caller) {
            return active->greedy_pointwise(path, objective, rule, workspace, caller);
          });
        });
  m.attr("dependent") = kDependent;
  m.attr("most_width") = kMostWidth;
  m.attr("most_swap_width") = kMostSwapWidth;
  m.def("swap_gains", [](Address gains, const Swaps& problem, int threads) {
    run(threads, [&](const Caller& caller) {
      return active->swap_gains(at<double>(gains), problem, caller);
    });
  });
  m.def("greedy_refit", [](Path& path, const Refit& refit, const py::sequence& problems,
                           const Rule& rule, const Workspace& workspace, int threads,
                           py::object step) {
    std::vector<LeastSquares> parts;
    for (const auto& problem : problems) parts.push_back(problem.cast<const LeastSquares&>());
    run(threads, std::move(step), py::none(), py::none(), [&](const Caller& caller) {
      return active->greedy_refit(path, refit, parts.data(), static_cast<int64_t>(parts.size()),
                                  rule, workspace, caller);
    });
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "greedyprune's compiled kernels; use them through greedyprune.kernels.ops";
  bind_structs(m);
  bind_features(m);
  bind_candidate_kernels<float>(m, "f32", &Kernels::candidate_loss_f32,
                                &Kernels::candidate_slope_f32);
  bind_candidate_kernels<double>(m, "f64", &Kernels::candidate_loss_f64,
                                 &Kernels::candidate_slope_f64);
  bind_greedy(m);
#ifdef GREEDYPRUNE_CUDA
  bind_cuda(m);
#endif

  m.def("instruction_sets", [] {
    py::list names;
    for (const char* const* name = instruction_sets(); *name; ++name) names.append(*name);
    return names;
  });
  m.def("active_instruction_set", [] { return active_name; });
  m.def("use_instruction_set", [](const std::string& wanted) {
    for (const char* const* name = instruction_sets(); *name; ++name) {
      if (wanted != *name) continue;
      active_name = *name;
      active = kernels_for(*name);
      return;
    }
    throw py::value_error("instruction set " + wanted +
                          " is not compiled in, or this processor does not run it");
  });
  m.attr("version") = GREEDYPRUNE_VERSION;
  m.attr("compiler") = GREEDYPRUNE_COMPILER;
#ifdef GREEDYPRUNE_CUDA
  m.attr("cuda") = GREEDYPRUNE_CUDA;
#else
  m.attr("cuda") = py::none();
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
