// Tensors as the kernels of the CPU see them.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "syncmask/attention.h"
#include "syncmask/tensors.h"

namespace syncmask::cpu {

// An output that the kernel is going to fill. glibc maps what is this large anew for every tensor,
// and faulting it in by pages of 4 KiB takes several times as long as writing it: ask for huge ones.
inline Tensor empty_output(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  Tensor output = empty(like, sizes, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kMapped = uintptr_t{32} << 20, kPage = 4096;
  const uintptr_t first = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + output.numel() * output.element_size()) / kPage * kPage;
  // A refusal only leaves the pages small.
  if (end >= begin + kMapped) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return output;
}

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
