// The module, and the CPU's kernels.
#include "bindings.h"

#include <chrono>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

using namespace greedyprune;

namespace {

const char* active_name = instruction_sets()[0];
const Kernels* active = kernels_for(active_name);

// Python callbacks behind the plain Caller. An exception ends the kernel and is raised after it.
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
    if (caller->step_.is_none()) {  // still look for Ctrl-C, but not at every microsecond's step
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
  py::class_<T> target(m, name, py::module_local());
  target.def(py::init<>())
      .def_property(
          "loss", [](const T& t) { return static_cast<int>(t.loss); },
          [](T& t, int loss) { t.loss = static_cast<Loss>(loss); })
      .def_readwrite("outputs", &T::outputs)
      .def_readwrite("scale", &T::scale);
  pointer(target, "value", &T::value);
  pointer(target, "label", &T::label);
  pointer(target, "weight", &T::weight);
}

void bind_structs(py::module_& m) {
  py::class_<Features> features(m, "Features", py::module_local());
  features.def(py::init<>())
      .def_property(
          "type", [](const Features& f) { return static_cast<int>(f.type); },
          [](Features& f, int type) { f.type = static_cast<Type>(type); })
      .def_readwrite("units", &Features::units)
      .def_readwrite("samples", &Features::samples)
      .def_readwrite("stride", &Features::stride);
  pointer(features, "data", &Features::data);
  pointer(features, "squares", &Features::squares);
  pointer(features, "largest", &Features::largest);

  bind_target<float>(m, "TargetF32");
  bind_target<double>(m, "TargetF64");

  py::class_<Rule> rule(m, "Rule", py::module_local());
  rule.def(py::init<>())
      .def_readwrite("steps", &Rule::steps)
      .def_readwrite("size", &Rule::size)
      .def_readwrite("replacement", &Rule::replacement)
      .def_readwrite("candidates", &Rule::candidates)
      .def_readwrite("shortlist", &Rule::shortlist);
  pointer(rule, "draws", &Rule::draws);

  py::class_<Path> path(m, "Path", py::module_local());
  path.def(py::init<>())
      .def_readonly("length", &Path::length)
      .def_readonly("scored", &Path::scored)
      .def_readonly("rescored", &Path::rescored);
  pointer(path, "order", &Path::order);
  pointer(path, "losses", &Path::losses);
  pointer(path, "gap", &Path::gap);

  py::class_<Workspace> workspace(m, "Workspace", py::module_local());
  workspace.def(py::init<>());
  pointer(workspace, "available", &Workspace::available);
  pointer(workspace, "scores", &Workspace::scores);
  pointer(workspace, "errors", &Workspace::errors);
  pointer(workspace, "contenders", &Workspace::contenders);
  pointer(workspace, "picked", &Workspace::picked);
  pointer(workspace, "exchange", &Workspace::exchange);
  workspace.def_readwrite("ranks", &Workspace::ranks);

  py::class_<Quadratic> quadratic(m, "Quadratic", py::module_local());
  quadratic.def(py::init<>())
      .def_readwrite("units", &Quadratic::units)
      .def_readwrite("outputs", &Quadratic::outputs)
      .def_readwrite("scale", &Quadratic::scale)
      .def_readwrite("target_norm", &Quadratic::target_norm)
      .def_readwrite("rounding", &Quadratic::rounding)
      .def_property(
          "features", [](const Quadratic& q) { return q.features; },
          [](Quadratic& q, const Features* seen) { q.features = seen; },
          py::return_value_policy::reference);
  pointer(quadratic, "norm", &Quadratic::norm);
  pointer(quadratic, "size", &Quadratic::size);
  pointer(quadratic, "beta", &Quadratic::beta);
  pointer(quadratic, "state", &Quadratic::state);
  pointer(quadratic, "outgoing", &Quadratic::outgoing);
  pointer(quadratic, "target", &Quadratic::target);
  pointer(quadratic, "sum", &Quadratic::sum);
  pointer(quadratic, "residual", &Quadratic::residual);
  pointer(quadratic, "all_units", &Quadratic::all_units);

  py::class_<ColumnCache> cache(m, "ColumnCache", py::module_local());
  cache.def(py::init<>())
      .def_readwrite("capacity", &ColumnCache::capacity)
      .def_readwrite("block", &ColumnCache::block)
      .def_readwrite("rank", &ColumnCache::rank);
  pointer(cache, "columns", &ColumnCache::columns);
  pointer(cache, "slot_of", &ColumnCache::slot_of);
  pointer(cache, "unit_in", &ColumnCache::unit_in);
  pointer(cache, "wanted", &ColumnCache::wanted);
  pointer(cache, "factor", &ColumnCache::factor);
  pointer(cache, "ahead", &ColumnCache::ahead);
  pointer(cache, "taken", &ColumnCache::taken);

  using S = LeastSquares;
  py::class_<S> squares(m, "LeastSquares", py::module_local());
  squares.def(py::init<>())
      .def_readwrite("units", &S::units)
      .def_readwrite("width", &S::width)
      .def_readwrite("outputs", &S::outputs)
      .def_readwrite("most", &S::most)
      .def_readwrite("scale", &S::scale)
      .def_readwrite("target_norm", &S::target_norm);
  pointer(squares, "gram", &S::gram);
  pointer(squares, "right", &S::right);
  pointer(squares, "factor", &S::factor);
  pointer(squares, "solved", &S::solved);
  pointer(squares, "place", &S::place);
  pointer(squares, "rest", &S::rest);
  pointer(squares, "root", &S::root);
  pointer(squares, "gain", &S::gain);

  using W = Swaps;
  py::class_<W> swaps(m, "Swaps", py::module_local());
  swaps.def(py::init<>())
      .def_readwrite("units", &W::units)
      .def_readwrite("width", &W::width)
      .def_readwrite("outputs", &W::outputs)
      .def_readwrite("kept_count", &W::kept_count)
      .def_readwrite("dropped_count", &W::dropped_count);
  pointer(swaps, "swept", &W::swept);
  pointer(swaps, "right", &W::right);
  pointer(swaps, "norms", &W::norms);
  pointer(swaps, "kept", &W::kept);
  pointer(swaps, "dropped", &W::dropped);
  pointer(swaps, "inner", &W::inner);
  pointer(swaps, "pull", &W::pull);
  pointer(swaps, "costs", &W::costs);

  using P = Pointwise;
  py::class_<P> pointwise(m, "Pointwise", py::module_local());
  pointwise.def(py::init<>())
      .def_readwrite("features", &P::features)
      .def_readwrite("target", &P::target)
      .def_readwrite("batch", &P::batch);
  pointer(pointwise, "outgoing", &P::outgoing);
  pointer(pointwise, "bias", &P::bias);
  pointer(pointwise, "linear", &P::linear);
  pointer(pointwise, "sum", &P::sum);
  pointer(pointwise, "starts", &P::starts);
  pointer(pointwise, "outputs64", &P::outputs64);
  pointer(pointwise, "outputs32", &P::outputs32);
  pointer(pointwise, "outgoing32", &P::outgoing32);
  pointer(pointwise, "weight32", &P::weight32);
  pointer(pointwise, "value32", &P::value32);
  pointer(pointwise, "linear_unit", &P::linear_unit);
  pointer(pointwise, "slopes", &P::slopes);
  pointer(pointwise, "slope_errors", &P::slope_errors);
  pointer(pointwise, "weight_batch", &P::weight_batch);
  pointer(pointwise, "value_batch", &P::value_batch);
  pointer(pointwise, "linear_batch", &P::linear_batch);
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
  m.def("collect_features", [](const Features& features, Address squares, Address largest,
                               Address hidden, int64_t n, int64_t at_sample, int threads) {
    run(threads, [&](const Caller& caller) {
      return active->collect_features(features, at<double>(squares), at<double>(largest),
                                      at<const void>(hidden), n, at_sample, caller);
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
  m.attr("most_width") = kMostWidth;
  m.attr("most_swap_width") = kMostSwapWidth;
  m.def("swap_gains", [](Address gains, const Swaps& problem, int threads) {
    run(threads, [&](const Caller& caller) {
      return active->swap_gains(at<double>(gains), problem, caller);
    });
  });
  m.def("greedy_refit", [](Path& path, const LeastSquares& problem, const Rule& rule,
                           const Workspace& workspace, int threads, py::object step) {
    run(threads, std::move(step), py::none(), py::none(), [&](const Caller& caller) {
      return active->greedy_refit(path, problem, rule, workspace, caller);
    });
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "greedyprune's compiled kernels; use them through greedyprune.ops";
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
