// Calls of the CUDA launchers from Python: the fields of an op's Args by name, which are numbers, addresses (0: null),
// and dtypes by name.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <string>

#include "river.h"

namespace river::emulation {

// A launcher with its arguments, and the workspace that it asks for
struct Call {
  cuda::WorkspaceSize size{};
  std::function<void(const cuda::Workspace&)> launch;
};

Call make_call(const std::string& op, const pybind11::kwargs& fields);
DType dtype_of(const std::string& name);

}  // namespace river::emulation
