// What queue_contrastive_loss does beside its matrix products, on float32 CPU tensors: threads take
// tiles of rows.
#include "syncmask/queue_losses.h"

#include <algorithm>
#include <tuple>

#include "tensors.h"

namespace syncmask::cpu {

SYNCMASK_CLONES void contrast(float* row, float* teacher, const Positives& positives, int64_t n,
                              TileSums& sums, TileSums& teacher_sums) {
  contrast_tile(row, teacher, positives, n, sums, teacher_sums);
}

SYNCMASK_CLONES void slope(float* row, const float* teacher, const Positives& positives, int64_t n,
                           float scale, float teacher_scale, float share) {
  slope_tile(row, teacher, positives, n, scale, teacher_scale, share);
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

// A tile of a row of the batch and, where there is a teacher, of its row of the same block.
struct Tile {
  float *row, *teacher;
  int64_t b, index, first, keys;
};

// Calls `visit` for each tile of `block` [batch or twice as many rows, keys].
template <typename Visit>
void for_tiles(const Tensor& block, int64_t batch, const Visit& visit) {
  STD_TORCH_CHECK(block.is_contiguous(), "a block must be contiguous");
  const int64_t keys = block.size(1), tiles = (keys + kTileKeys - 1) / kTileKeys;
  const int64_t to_teacher = block.size(0) > batch ? batch * keys : 0;
  torch::stable::parallel_for(0, batch * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, index = i % tiles, first = index * kTileKeys;
      float* row = data<float>(block) + b * keys + first;
      visit(Tile{row, to_teacher ? row + to_teacher : nullptr, b, index, first,
                 std::min(kTileKeys, keys - first)});
    }
  });
}

Positives positives(const Rows<int64_t>& own, const Rows<int64_t>& ids, const Tile& tile) {
  return {own.data()[tile.b], ids.data() ? ids.data() + tile.first : nullptr};
}

Tensor room(Tensor like, int64_t size) { return empty_output(like, {size}, ScalarType::Float); }

using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Sums exponentials_(Tensor logits, Tensor own_ids, MaybeTensor ids) {
  const int64_t batch = own_ids.size(0), rows = logits.size(0);
  const int64_t tiles = (logits.size(1) + kTileKeys - 1) / kTileKeys;
  const Rows<int64_t> own(own_ids), others(ids);
  const auto sums_of = [&](int64_t count) {
    return empty(logits, {count, tiles}, ScalarType::Float);
  };
  const Tensor top = sums_of(rows), total = sums_of(rows), mixed = sums_of(batch);
  const Tensor positive = sums_of(batch), count = sums_of(batch);
  for_tiles(logits, batch, [&](const Tile& tile) {
    TileSums sums{}, teacher_sums{};
    contrast(tile.row, tile.teacher, positives(own, others, tile), tile.keys, sums, teacher_sums);
    const int64_t i = tile.b * tiles + tile.index;
    data<float>(top)[i] = sums.top;
    data<float>(total)[i] = sums.total;
    data<float>(mixed)[i] = sums.mixed;
    data<float>(positive)[i] = sums.positive;
    data<float>(count)[i] = sums.count;
    if (tile.teacher != nullptr) {
      data<float>(top)[batch * tiles + i] = teacher_sums.top;
      data<float>(total)[batch * tiles + i] = teacher_sums.total;
    }
  });
  return {top, total, mixed, positive, count};
}

void slopes_(Tensor weights, Tensor scales, Tensor own_ids, MaybeTensor ids, Tensor share) {
  const int64_t batch = own_ids.size(0), tiles = scales.size(1);
  const Rows<int64_t> own(own_ids), others(ids);
  const Rows<float> scale(scales, tiles), shares(share);
  for_tiles(weights, batch, [&](const Tile& tile) {
    slope(tile.row, tile.teacher, positives(own, others, tile), tile.keys,
          scale.row(tile.b)[tile.index],
          tile.teacher ? scale.row(batch + tile.b)[tile.index] : 0.0f, shares.data()[tile.b]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("queue_contrast_room.cpu", TORCH_BOX(&room));
  library.impl("queue_contrast_exponentials_.cpu", TORCH_BOX(&exponentials_));
  library.impl("queue_contrast_slopes_.cpu", TORCH_BOX(&slopes_));
}
