// The arguments of an op that takes many, by the names that its schema gives them.
//
// Torch hands them over as untyped values on a stack, in the schema's order. `Arguments` finds each by its name and
// type while the op is compiled, so that no order is repeated anywhere; a name that the schema does not have, or has
// with another type, is a compile error. What is left at run time is a constant place on the stack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "abi.h"  // before any header of torch

namespace river::ops {

// How a schema writes the type T.
template <class T>
consteval std::string_view schema_type() {
  if (std::is_same_v<T, Tensor>) return "Tensor";
  if (std::is_same_v<T, OptionalTensor>) return "Tensor?";
  if (std::is_same_v<T, bool>) return "bool";
  if (std::is_same_v<T, int64_t>) return "int";
  if (std::is_same_v<T, std::optional<int64_t>>) return "int?";
  if (std::is_same_v<T, double>) return "float";
  if (std::is_same_v<T, std::optional<double>>) return "float?";
  return "unknown";
}

// "Tensor(a!) x, float? eps=None" of the schema "(Tensor(a!) x, float? eps=None) -> Tensor".
consteval std::string_view arguments_of(std::string_view schema) { return schema.substr(1, schema.find(") ->") - 1); }

consteval int count_of_arguments(std::string_view schema) {
  const std::string_view arguments = arguments_of(schema);
  return int(std::count(arguments.begin(), arguments.end(), ',')) + 1;
}

// How many tensors an op returns: "-> Tensor", "-> (Tensor, Tensor)" or "-> ()".
consteval int count_of_results(std::string_view schema) {
  int results = 0;
  for (size_t at = schema.find("->"); (at = schema.find("Tensor", at + 1)) != std::string_view::npos;) results++;
  return results;
}

consteval int place_of(std::string_view schema, std::string_view type, std::string_view name) {
  std::string_view rest = arguments_of(schema);
  for (int place = 0;; place++) {
    const std::string_view argument = rest.substr(0, rest.find(", "));
    const size_t space = argument.find(' '), end = std::min(argument.find('='), argument.size());
    const std::string_view its_type = argument.substr(0, std::min(argument.find('('), space));
    const std::string_view its_name = argument.substr(space + 1, end - space - 1);
    if (its_type == type && its_name == name) return place;
    if (argument.size() == rest.size()) throw "the schema has no argument of this name and type";
    rest.remove_prefix(argument.size() + 2);
  }
}

static_assert(place_of("(Tensor(a!) x, float? eps=None) -> Tensor", "Tensor", "x") == 0);
static_assert(place_of("(Tensor(a!) x, float? eps=None) -> Tensor", "float?", "eps") == 1);

// An op owns what it reads: a value that it leaves unread would leak, one that it reads twice would be freed twice.
template <const char* schema>
class Arguments {
  template <class T>
  struct Place {
    int index;
    consteval Place(const char* name) : index(place_of(schema, schema_type<T>(), name)) {}
  };

 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}

  Tensor tensor(Place<Tensor> place) { return take(place); }
  OptionalTensor optional_tensor(Place<OptionalTensor> place) { return take(place); }
  bool boolean(Place<bool> place) { return take(place); }
  int64_t integer(Place<int64_t> place) { return take(place); }
  std::optional<int64_t> optional_integer(Place<std::optional<int64_t>> place) { return take(place); }
  double number(Place<double> place) { return take(place); }
  std::optional<double> optional_number(Place<std::optional<double>> place) { return take(place); }

  void expect_all_read() const {
    if (unread_) throw std::logic_error("river: an op leaves an argument unread");
  }

 private:
  template <class T>
  T take(Place<T> place) {
    const uint64_t bit = uint64_t(1) << place.index;
    if (!(unread_ & bit)) throw std::logic_error("river: an op reads an argument twice");
    unread_ -= bit;
    return torch::stable::detail::to<T>(stack_[place.index]);
  }

  StableIValue* stack_;
  uint64_t unread_ = (uint64_t(1) << count_of_arguments(schema)) - 1;  // a bit for each argument
};

// boxed<&op> is an op as torch calls it, where `std::tuple<Tensor, ...> op(Arguments<schema>& read)` reads all of its
// arguments before it does anything else.
template <const char* schema, class... Results>
void call_boxed(std::tuple<Results...> (*op)(Arguments<schema>&), StableIValue* stack) {
  static_assert(sizeof...(Results) == count_of_results(schema));
  Arguments<schema> arguments(stack);
  const std::tuple<Results...> results = op(arguments);
  arguments.expect_all_read();
  std::apply([stack](const auto&... result) mutable { ((*stack++ = torch::stable::detail::from(result)), ...); },
             results);
}

template <auto op>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  call_boxed(op, stack);
}

}  // namespace river::ops
