// grouped_order for CPU tensors: bytes tell which similarities need to be known exactly.
#include "syncmask/grouping.h"
#include "syncmask/grouping_rank.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "tensors.h"

namespace syncmask::cpu {

// Compiled for each instruction set.
SYNCMASK_CLONES float coarsen_row(const float* row, int64_t dim, int8_t* bytes) {
  return coarsen(row, dim, bytes);
}

SYNCMASK_CLONES void read_query(const float* row, int64_t dim, int64_t width, Query& query) {
  query.read(row, dim, width);
}

SYNCMASK_CLONES void bound_rows(const Query& query, const int32_t* sums, const float* scales,
                                int64_t count, float* low, float* high) {
  bound(query, sums, scales, count, low, high);
}

void products_of(const Query& query, const int8_t* rows, int64_t count, int64_t width,
                 int32_t* sums) {
#ifdef SYNCMASK_AVX2_AT_RUN_TIME
  if (__builtin_cpu_supports("avx2")) {
    return products_avx2(query.values, rows, count, width, sums);
  }
#endif
  products(query.values, rows, count, width, sums);
}

SYNCMASK_CLONES float floor_of_rows(const float* low, const float* high, int64_t count,
                                    float ceiling) {
  return floor_of(low, high, count, ceiling);
}

SYNCMASK_CLONES int64_t hopeful_rows(const float* low, const float* high, int64_t count,
                                     float floor, float ceiling, uint32_t* places) {
  return hopeful(low, high, count, floor, ceiling, places);
}

SYNCMASK_CLONES float similarity(const float* a, const float* b, int64_t dim) {
  return dot(a, b, dim);
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

constexpr int64_t kBytesOfThread = 1 << 21;  // a step of fewer is too short to share

// The features of one side; bytes and scales of the unused examples lie side by side.
struct Features {
  Rows<float> rows;
  std::vector<int8_t> bytes;
  std::vector<float> scales;

  Features(const Tensor& tensor, int64_t width)
      : rows(as_float(tensor), tensor.size(1)),
        bytes(tensor.size(0) * width),
        scales(tensor.size(0)) {
    for (int64_t i = 0; i < tensor.size(0); ++i) {
      scales[i] = coarsen_row(rows.row(i), tensor.size(1), bytes.data() + i * width);
    }
  }
};

class Chain {
 public:
  Chain(const Tensor& image_feat, const Tensor& text_feat, const MaybeTensor& item_ids,
        bool semi_hard, int64_t window)
      : dim_(image_feat.size(1)),
        width_(std::max(dim_ + kCoarseWidth - 1, kCoarseWidth) / kCoarseWidth * kCoarseWidth),
        count_(image_feat.size(0)),
        semi_hard_(semi_hard),
        window_(window),
        items_(item_ids),
        sides_{Features(image_feat, width_), Features(text_feat, width_)},
        unused_(count_),
        place_(count_),
        free_at_(item_ids ? count_ : 0),
        sums_(count_),
        low_(count_),
        high_(count_),
        hopeful_(count_ + 1),
        values_(width_) {
    std::iota(unused_.begin(), unused_.end(), 0);
    std::iota(place_.begin(), place_.end(), 0);
  }

  void take(uint32_t example, int64_t step) {
    const uint32_t place = place_[example], last = static_cast<uint32_t>(--count_);
    unused_[place] = unused_[last];
    place_[unused_[place]] = place;
    for (Features& side : sides_) {
      int8_t* bytes = side.bytes.data();
      if (place != last) std::copy_n(bytes + last * width_, width_, bytes + place * width_);
      side.scales[place] = side.scales[last];
    }
    for (int64_t i = 0; !free_at_.empty() && i < count_; ++i) {
      const uint32_t other = unused_[i];
      if (items_.data()[other] == items_.data()[example]) free_at_[other] = step + window_;
    }
  }

  // The example to take at this step, which comes after `current`.
  uint32_t next(uint32_t current, int64_t step) {
    const Features &from = sides_[(step - 1) % 2], &to = sides_[step % 2];
    const float* row = from.rows.row(current);
    Wish wish{semi_hard_, INFINITY};
    if (semi_hard_) wish.ceiling = similarity(row, to.rows.row(current), dim_);
    Query query{values_.data(), 0.0f, 0.0f};
    read_query(row, dim_, width_, query);
    const int64_t grain = std::max<int64_t>(1, kBytesOfThread / width_);
    torch::stable::parallel_for(0, count_, grain, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      products_of(query, to.bytes.data() + begin * width_, count, width_, sums_.data() + begin);
      bound_rows(query, sums_.data() + begin, to.scales.data() + begin, count,
                 low_.data() + begin, high_.data() + begin);
    });
    for (int64_t i = 0; !free_at_.empty() && i < count_; ++i) {
      if (!apart(i, step)) low_[i] = NAN;  // of whom the others are not measured by
    }
    const float floor = floor_of_rows(low_.data(), high_.data(), count_, wish.ceiling);
    const int64_t found = hopeful_rows(low_.data(), high_.data(), count_, floor, wish.ceiling,
                                       hopeful_.data());
    const uint64_t best = best_of(row, to, wish, step, hopeful_.data(), found);
    if (best >= Wish::kind(2) || !semi_hard_) return Wish::example(best);
    std::iota(hopeful_.begin(), hopeful_.begin() + count_, 0);
    return Wish::example(best_of(row, to, wish, step, hopeful_.data(), count_));
  }

 private:
  bool apart(int64_t place, int64_t step) const {
    return free_at_.empty() || free_at_[unused_[place]] <= step;
  }

  uint64_t best_of(const float* row, const Features& to, const Wish& wish, int64_t step,
                   const uint32_t* places, int64_t count) const {
    uint64_t best = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t example = unused_[places[i]];
      const uint64_t rank =
          apart(places[i], step) ? wish.rank(similarity(row, to.rows.row(example), dim_), example)
                         : Wish::last_resort(example);
      best = std::max(best, rank);
    }
    return best;
  }

  int64_t dim_, width_, count_;
  bool semi_hard_;
  int64_t window_;
  Rows<int64_t> items_;
  Features sides_[2];
  std::vector<uint32_t> unused_, place_;  // place_ is where an example stands in unused_
  std::vector<int64_t> free_at_;          // the step from which on an example's item may come again
  std::vector<int32_t> sums_;
  std::vector<float> low_, high_;
  std::vector<uint32_t> hopeful_;  // places whose similarities need to be known exactly
  std::vector<int16_t> values_;
};

Tensor grouped_order(Tensor image_feat, Tensor text_feat, MaybeTensor item_ids, int64_t start,
                     bool semi_hard, int64_t window) {
  const int64_t size = image_feat.size(0);
  STD_TORCH_CHECK(size <= kLastExample, "at most 2**30 - 1 examples, got ", size);
  Tensor order = empty(image_feat, {size}, ScalarType::Long);
  if (size == 0) return order;
  Chain chain(image_feat, text_feat, item_ids, semi_hard, window);
  int64_t* out = data<int64_t>(order);
  out[0] = start;
  for (int64_t step = 1; step < size; ++step) {
    chain.take(static_cast<uint32_t>(out[step - 1]), step - 1);
    out[step] = chain.next(static_cast<uint32_t>(out[step - 1]), step);
  }
  return order;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("grouped_order.cpu", TORCH_BOX(&grouped_order));
}
