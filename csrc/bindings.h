// What the bindings share: bindings*.cpp are the only files that know Python. Tensors arrive as
// addresses (tensor.data_ptr()); greedyprune/ops.py has checked them. Structs are the ones of
// kernels.h, field by field.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

namespace greedyprune {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class S, class T>
void pointer(py::class_<S>& c, const char* name, T* S::* member) {
  c.def_property(
      name, [member](const S& s) { return reinterpret_cast<Address>(s.*member); },
      [member](S& s, Address address) { s.*member = at<T>(address); });
}

#ifdef GREEDYPRUNE_CUDA
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

}  // namespace greedyprune
