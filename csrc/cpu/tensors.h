// Tensors as the kernels of the CPU see them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "syncmask/attention.h"
#include "syncmask/tensors.h"

namespace syncmask::cpu {

// Calls `run` with a null pointer of the tensor's type of floats.
template <typename Run>
void by_type(const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return run(static_cast<BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

// Heads of q, k and v [L, B, H, N, D] as rows.
template <typename T>
HeadRows<T> head_rows(const Tensor& x, int64_t l, int64_t b, int64_t h) {
  const T* first = static_cast<const T*>(x.const_data_ptr());
  return {first + l * x.stride(0) + b * x.stride(1) + h * x.stride(2), x.stride(3), x.stride(4),
          x.size(3), x.size(4)};
}

}  // namespace syncmask::cpu
