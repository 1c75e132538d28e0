// Rows of tensors [B, N, D]: moved and summed where a mask or ids name them.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "syncmask/vector.h"

namespace syncmask {

// A tensor [B, N, D] of any layout.
template <typename T>
struct Examples {
  const T* data;
  int64_t example, position, column;  // distances between them
  int64_t positions, columns;

  const T* row(int64_t b, int64_t n) const { return data + b * example + n * position; }
  // Row i of the same as [B * N, D].
  const T* row(int64_t i) const { return row(i / positions, i % positions); }
};

template <typename T>
SYNCMASK_INLINE void copy_row(const T* from, int64_t stride, int64_t columns, T* to) {
  if (stride == 1) {
    std::memcpy(to, from, columns * sizeof(T));
  } else {
    for (int64_t d = 0; d < columns; ++d) to[d] = from[d * stride];
  }
}

// Asks for the start of a row that is read next; from there the processor looks ahead by itself.
template <typename T>
SYNCMASK_INLINE void prefetch_row(const T* row, int64_t columns) {
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; row && i < bytes && i < 1024; i += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
  }
}

// sums [D] += a row.
template <typename T>
SYNCMASK_INLINE void add_row(const T* from, int64_t stride, int64_t columns, float* sums) {
  if (stride == 1) {
    for (int64_t d = 0; d < columns; ++d) sums[d] += widen(from[d]);
  } else {
    for (int64_t d = 0; d < columns; ++d) sums[d] += widen(from[d * stride]);
  }
}

// For each position of [B * N] the rows of [B * K] that point to it, in ascending order: the first,
// and after each row the next one; -1 where there is none.
class RowsByPosition {
 public:
  RowsByPosition(const int64_t* ids, int64_t batch, int64_t rows, int64_t positions)
      : first_(batch * positions, -1), next_(batch * rows, -1) {
    for (int64_t i = batch * rows - 1; i >= 0; --i) {
      if (ids[i] < 0 || ids[i] >= positions) continue;
      int64_t& first = first_[i / rows * positions + ids[i]];
      next_[i] = first;
      first = i;
    }
  }
  int64_t first(int64_t position) const { return first_[position]; }
  int64_t next(int64_t row) const { return next_[row]; }

 private:
  std::vector<int64_t> first_, next_;
};

}  // namespace syncmask
