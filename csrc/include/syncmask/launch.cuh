// What launchers share: streams, types, and the dispatch key of their operators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include "syncmask/tensors.h"

// The tests run these kernels on the CPU and register them there.
#ifndef SYNCMASK_CUDA_KEY
#define SYNCMASK_CUDA_KEY CUDA
#endif

namespace syncmask {

// The tensor's device and its current stream, for as long as this lives.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  operator cudaStream_t() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Calls use(T{}) with the type of the elements.
template <typename Use>
void with_type(const char* name, const Tensor& tensor, const Use& use) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return use(float{});
    case ScalarType::Half:
      return use(__half{});
    case ScalarType::BFloat16:
      return use(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

}  // namespace syncmask
