// grouped_order for CUDA tensors: one launch.
#include "syncmask/grouping.cuh"
#include "syncmask/launch.cuh"

#include <algorithm>

namespace {

using namespace syncmask;

Tensor grouped_order(Tensor image_feat, Tensor text_feat, MaybeTensor item_ids, int64_t start,
                     bool semi_hard, int64_t window) {
  const int64_t size = image_feat.size(0), dim = image_feat.size(1);
  STD_TORCH_CHECK(size <= kLastExample, "at most 2**30 - 1 examples, got ", size);
  Tensor order = empty(image_feat, {size}, ScalarType::Long);
  if (size == 0) return order;

  const Stream stream(image_feat);
  const bool mixed = image_feat.scalar_type() != text_feat.scalar_type();
  const Tensor image = torch::stable::contiguous(mixed ? *as_float(image_feat) : image_feat);
  const Tensor text = torch::stable::contiguous(mixed ? *as_float(text_feat) : text_feat);
  const Rows<int64_t> items(item_ids);
  const Tensor scratch = empty(image_feat, {3, size}, ScalarType::Int);
  int* room = data<int>(scratch);
  with_type("image_feat", image, [&]<typename T>(T) {
    const Chain<T> chain{.image = static_cast<const T*>(image.const_data_ptr()),
                         .text = static_cast<const T*>(text.const_data_ptr()),
                         .item_ids = items.data(),
                         .dim = dim,
                         .size = static_cast<int>(size),
                         .start = static_cast<int>(start),
                         .window = static_cast<int>(std::min(window, size)),
                         .semi_hard = semi_hard,
                         .unused = room,
                         .place = room + size,
                         .free_at = room + 2 * size,
                         .order = data<int64_t>(order)};
    chain_kernel<T><<<1, kMaxWarps * kLanes, 0, stream>>>(chain);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return order;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, SYNCMASK_CUDA_KEY, library) {
  library.impl("grouped_order.cuda", TORCH_BOX(&grouped_order));
}
