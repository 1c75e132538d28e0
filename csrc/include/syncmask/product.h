// Matrix products of tiles: C[m, n] = sum over k of A[m, k] * B[k, n], eight n side by side in a
// vector. Where n are the words, what follows runs down the rows without shuffles.
#pragma once

#include <algorithm>
#include <type_traits>

#include "syncmask/vector.h"

#ifdef __clang__
#define SYNCMASK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SYNCMASK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

namespace syncmask {

// A matrix of floats, by the distance between rows and between columns.
struct Matrix {
  const float* data;
  int64_t row, column;

  SYNCMASK_INLINE Matrix from(int64_t m, int64_t k) const {
    return {data + m * row + k * column, row, column};
  }
};

constexpr int kRows = 6;        // with two vectors of B they fill the sixteen registers of AVX2
constexpr int64_t kDepth = 64;  // rows of B that stay in the first cache beside A and C

// A block of C in registers; its first `known` rows are left as they are.
template <int kCount, int kVectors>
SYNCMASK_INLINE void product_block(const Matrix& a, const float* b, int64_t b_row, int64_t depth,
                                   bool add, int known, float* c, int64_t c_row) {
  Floats sums[kCount][kVectors] = {};
  const float* left = a.data;
  for (int64_t k = 0; k < depth; ++k, left += a.column, b += b_row) {
    Floats right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) widen(b + v * kLanes, right[v]);
#pragma GCC unroll 16
    for (int m = 0; m < kCount; ++m) {
      const float factor = left[m * a.row];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[m][v] += factor * right[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kCount; ++m) {
    if (m < known) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* place = c + m * c_row + v * kLanes;
      Floats before = {};
      if (add) widen(place, before);
      store(before + sums[m][v], place);
    }
  }
}

template <int kCount>
SYNCMASK_INLINE void product_rows(const Matrix& a, const float* b, int64_t b_row, int64_t columns,
                                  int64_t depth, bool add, int known, float* c, int64_t c_row) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
    product_block<kCount, 2>(a, b + n, b_row, depth, add, known, c + n, c_row);
  }
  if (n < columns) product_block<kCount, 1>(a, b + n, b_row, depth, add, known, c + n, c_row);
}

// Asks for kRows rows of A ahead of their use. Processors see neighbours coming, but not a row far
// away or on another page. Rows beyond the last do no harm, and the next product may go on there.
SYNCMASK_INLINE void prefetch_rows(const Matrix& a, int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(float);
  if (a.column != 1) return;
  for (int64_t k = 0; k < depth; k += kLine) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) __builtin_prefetch(a.data + m * a.row + k);
  }
}

// C [rows, columns] = A [rows, depth] B [depth, columns], columns a multiple of kLanes. The rows of B
// and C are b_row and c_row apart.
SYNCMASK_INLINE void product(const Matrix& a, int64_t rows, const float* b, int64_t b_row,
                             int64_t columns, int64_t depth, float* c, int64_t c_row) {
  for (int64_t m = 0; depth == 0 && m < rows; ++m) std::fill_n(c + m * c_row, columns, 0.0f);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = std::min(kDepth, depth - k);
    const float* right = b + k * b_row;
    const int64_t single = rows < kRows ? rows : 0;
    for (int64_t m = 0; m < single; ++m) {
      product_rows<1>(a.from(m, k), right, b_row, columns, part, k > 0, 0, c + m * c_row, c_row);
    }
    // The last block goes back over rows that are known already.
    for (int64_t next = single; next < rows; next += kRows) {
      const int64_t m = std::min(next, rows - kRows);
      prefetch_rows(a.from(next + kRows, k), part);
      product_rows<kRows>(a.from(m, k), right, b_row, columns, part, k > 0,
                          static_cast<int>(next - m), c + m * c_row, c_row);
    }
  }
}

// Interleaves the lanes of eight vectors: lane i of vector j becomes lane j of vector i.
SYNCMASK_INLINE void transpose(Floats (&v)[kLanes]) {
  Floats pairs[kLanes], quads[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = SYNCMASK_SHUFFLE(v[i], v[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    pairs[i + 1] = SYNCMASK_SHUFFLE(v[i], v[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Floats &a = pairs[i + j], &b = pairs[i + j + 2];
      quads[i + j] = SYNCMASK_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + j + 2] = SYNCMASK_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 2; ++i) {
    v[i] = SYNCMASK_SHUFFLE(quads[i], quads[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = SYNCMASK_SHUFFLE(quads[i], quads[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// The transpose of `rows` rows of `columns` values, times a factor: to [columns, width], whose lanes
// beyond `rows` are 0. `rows` <= width, a multiple of kLanes.
template <typename T>
SYNCMASK_INLINE void pack(const T* from, int64_t row, int64_t column, int64_t rows, int64_t columns,
                          float factor, float* to, int64_t width) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const int64_t present = std::clamp<int64_t>(rows - lane, 0, kLanes);
    const T* first = from + lane * row;
    int64_t c = 0;
    for (; column == 1 && c + kLanes <= columns; c += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) {
        block[i] = Floats{};
        if (i < present) widen(first + i * row + c, block[i]);
      }
      transpose(block);
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) store(block[i] * factor, to + (c + i) * width + lane);
    }
    for (; c < columns; ++c) {
      for (int64_t i = 0; i < kLanes; ++i) {
        to[c * width + lane + i] = i < present ? widen(first[i * row + c * column]) * factor : 0.0f;
      }
    }
  }
}

// The way back, of [columns, width]: rows [rows, columns], row r times factors[r].
template <typename T>
SYNCMASK_INLINE void unpack(const float* from, int64_t width, int64_t rows, int64_t columns,
                            const float* factors, T* to, int64_t row) {
  for (int64_t lane = 0; lane < rows; lane += kLanes) {
    const int64_t present = std::min<int64_t>(rows - lane, kLanes);
    Floats factor;
    widen(factors + lane, factor);
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) {
        widen(from + (c + i) * width + lane, block[i]);
        block[i] *= factor;
      }
      transpose(block);
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) {
        if (i < present) store(block[i], to + (lane + i) * row + c);
      }
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < present; ++i) {
        narrow(from[c * width + lane + i] * factor[i], to + (lane + i) * row + c);
      }
    }
  }
}

// Rows as floats [rows, columns]: where they are, if their columns are neighbours and fill vectors of
// `lanes`, else copied into `room`, whose rows are padded with zeros to a multiple of `lanes`.
template <typename T>
SYNCMASK_INLINE Matrix as_matrix(const T* from, int64_t row, int64_t column, int64_t rows,
                                 int64_t columns, int64_t lanes, float* room) {
  if constexpr (std::is_same_v<T, float>) {
    if (column == 1 && columns % lanes == 0) return {from, row, 1};
  }
  const int64_t width = (columns + lanes - 1) / lanes * lanes;
  for (int64_t r = 0; r < rows; ++r) {
    const T* values = from + r * row;
    float* wide = room + r * width;
    int64_t c = 0;
    for (; column == 1 && c + kLanes <= columns; c += kLanes) {
      Floats value;
      widen(values + c, value);
      store(value, wide + c);
    }
    for (; c < width; ++c) wide[c] = c < columns ? widen(values[c * column]) : 0.0f;
  }
  return {room, width, 1};
}

}  // namespace syncmask
