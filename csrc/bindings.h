// What the bindings share. bindings*.cpp are the only files that know Python. Tensors arrive as
// addresses (tensor.data_ptr()); greedyprune/kernels/ops.py has checked them. Python fills the
// structs of kernels.h field by field, by name.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace greedyprune {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// ---------------------------------------------------------------------------------------------
// The number of a struct's fields: the number of initial values that its braces take. So a struct
// cannot be bound with a field missing, and Python (structs.py) cannot leave a field empty.

struct AnyValue {
  template <class T>
  operator T() const;
};

template <class S, size_t... i>
auto takes(std::index_sequence<i...>)
    -> decltype(S{(static_cast<void>(i), AnyValue())...}, std::true_type());
template <class S>
std::false_type takes(...);
template <class S, size_t n>
constexpr bool has_fields = decltype(takes<S>(std::make_index_sequence<n>()))::value &&
                            !decltype(takes<S>(std::make_index_sequence<n + 1>()))::value;

template <class S, class T>
struct Field {
  const char* name;
  T S::* member;
};

// A pointer to numbers is an address in Python, or None for null. An enumerator is its number.
template <class S, class T>
void bind_field(py::class_<S>& c, const Field<S, T>& field) {
  T S::* const member = field.member;
  using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
  if constexpr (std::is_enum_v<T>) {
    c.def_property(
        field.name, [member](const S& s) { return static_cast<int>(s.*member); },
        [member](S& s, int number) { s.*member = static_cast<T>(number); });
  } else if constexpr (std::is_pointer_v<T> && std::is_class_v<Pointee>) {
    c.def_property(
        field.name, [member](const S& s) { return s.*member; },
        [member](S& s, T pointer) { s.*member = pointer; }, py::return_value_policy::reference);
  } else if constexpr (std::is_pointer_v<T>) {
    c.def_property(
        field.name, [member](const S& s) { return reinterpret_cast<Address>(s.*member); },
        [member](S& s, const py::object& address) {
          s.*member = address.is_none() ? nullptr : reinterpret_cast<T>(address.cast<Address>());
        });
  } else {
    c.def_readwrite(field.name, member);
  }
}

// The struct as a class, with the names of all its fields in FIELDS.
template <class S, class... T>
void bind_struct(py::module_& m, const char* name, const Field<S, T>&... fields) {
  static_assert(has_fields<S, sizeof...(T)>, "list every field of the struct");
  py::class_<S> c(m, name, py::module_local());
  c.def(py::init<>());
  (bind_field(c, fields), ...);
  c.attr("FIELDS") = py::make_tuple(fields.name...);
  if (py::set(c.attr("FIELDS")).size() != sizeof...(T))
    throw std::logic_error(std::string(name) + " has a field that is listed twice");
}

// One entry of that list: no field can have another's name.
#define FIELD(S, name) \
  Field<S, decltype(S::name)> { #name, &S::name }

#ifdef GREEDYPRUNE_CUDA
void bind_cuda(py::module_& m);  // bindings_cuda.cpp
#endif

}  // namespace greedyprune
