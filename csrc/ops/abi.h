// Tensors as the ops use them, by torch's stable ABI: one binary serves torch 2.11 and later.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <string>

namespace river::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;  // allocates nothing: an op checks up to 30 tensors

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

template <class T>
constexpr ScalarType kScalarType = torch::headeronly::CppTypeToScalarType<T>::value;

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

constexpr int64_t kAny = -1;  // a size that is not checked

// A shape in a message, made into text only when a check fails.
template <class Values>
struct Shape {
  const Values& values;

  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    const char* separator = "";
    out << "[";
    for (const int64_t value : shape.values) {
      out << separator;
      if (value == kAny) out << "*";
      else out << value;
      separator = ", ";
    }
    return out << "]";
  }
};

template <class Values>
Shape(const Values&) -> Shape<Values>;

template <class T = void>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T = void>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A contiguous tensor on the device of `like`. torch::stable::new_empty would look its op up by name in every call.
inline Tensor empty(Sizes sizes, ScalarType type, const Tensor& like) {
  int64_t strides[4], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes.begin()[i]) strides[i] = stride;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype, device_type,
                                                  like.get_device_index(), &out));
  return Tensor(out);
}

}  // namespace river::ops
