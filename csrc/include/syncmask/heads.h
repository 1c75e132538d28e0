// Sums of attention over layers and heads, read plane after plane: the processor's prefetchers follow
// a few long runs better than many short ones.
#pragma once

#include <algorithm>
#include <cstdint>

#include "syncmask/vector.h"

namespace syncmask {

// Attention of one example: `count` = layers * heads maps of [words, patches].
template <typename T>
struct Planes {
  const T* const* first;  // the first patch of the first word of each
  int64_t count, row;     // row: the distance between words
};

constexpr int kPlanes = 4;  // read side by side, so that the sums are fetched a quarter as often

// Words whose sums stay in the second cache while the planes go by.
SYNCMASK_INLINE int64_t words_at_once(int64_t patches) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(patches, 1));
}

// sums = or += the same row of kCount planes.
template <int kCount, typename T>
SYNCMASK_INLINE void add_rows(const T* const* planes, int64_t offset, int64_t patches, bool add,
                              float* sums) {
  const T* rows[kCount];
  for (int i = 0; i < kCount; ++i) rows[i] = planes[i] + offset;
  const auto total_at = [&](int64_t p, Floats& total) __attribute__((always_inline)) {
    Floats value;
    widen(rows[0] + p, total);
#pragma GCC unroll 4
    for (int i = 1; i < kCount; ++i) {
      widen(rows[i] + p, value);
      total += value;
    }
  };
  Floats total = {}, sum = {};
  int64_t p = 0;
  for (; p + kLanes <= patches; p += kLanes) {
    total_at(p, total);
    if (add) {
      widen(sums + p, sum);
      total += sum;
    }
    store(total, sums + p);
  }
  if (p == patches) return;
  if (patches < kLanes) {
    for (; p < patches; ++p) {
      float value = widen(rows[0][p]);
      for (int i = 1; i < kCount; ++i) value += widen(rows[i][p]);
      sums[p] = add ? sums[p] + value : value;
    }
    return;
  }
  // The last vector overlaps the one before it, whose lanes keep their sums.
  const int64_t last = patches - kLanes;
  total_at(last, total);
  widen(sums + last, sum);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (last + lane < p) {
      total[lane] = sum[lane];
    } else if (add) {
      total[lane] += sum[lane];
    }
  }
  store(total, sums + last);
}

// sums [count of words, patches]: the words named, summed over all planes.
template <typename T>
SYNCMASK_INLINE void sum_planes(const Planes<T>& planes, const int64_t* words, int64_t count,
                                int64_t patches, float* sums) {
  for (int64_t plane = 0; plane < planes.count; plane += kPlanes) {
    const T* const* group = planes.first + plane;
    const int64_t grouped = std::min<int64_t>(planes.count - plane, kPlanes);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = words[i] * planes.row;
      float* row = sums + i * patches;
      switch (grouped) {
        case 4: add_rows<4>(group, offset, patches, plane > 0, row); break;
        case 3: add_rows<3>(group, offset, patches, plane > 0, row); break;
        case 2: add_rows<2>(group, offset, patches, plane > 0, row); break;
        default: add_rows<1>(group, offset, patches, plane > 0, row);
      }
    }
  }
}

}  // namespace syncmask
