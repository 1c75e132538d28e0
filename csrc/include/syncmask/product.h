// Matrix products of tiles: C[m, lane] = sum over k of A[m, k] * B[k, lane], with the lanes of B (the
// words) side by side in vectors, so that what follows runs down the rows without shuffles.
#pragma once

#include <algorithm>

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
};

constexpr int64_t kDepth = 256;  // rows of B that stay in the first cache beside A

template <int kRows, int kVectors>
SYNCMASK_INLINE void product_block(const Matrix& a, const float* b, int64_t width, int64_t depth,
                                   bool add, float* c) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[m][v] = Floats{};
      if (add) widen(c + m * width + v * kLanes, sums[m][v]);
    }
  }
  const float* left = a.data;
  for (int64_t k = 0; k < depth; ++k, left += a.column, b += width) {
    Floats right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) widen(b + v * kLanes, right[v]);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const float factor = left[m * a.row];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[m][v] += factor * right[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums[m][v], c + m * width + v * kLanes);
  }
}

// All rows of A by some vectors of B, kRows rows at a time; the last rows are computed twice where
// kRows does not divide.
template <int kRows, int kVectors>
SYNCMASK_INLINE void product_columns(const Matrix& a, int64_t rows, const float* b, int64_t width,
                                     int64_t depth, bool add, float* c) {
  int64_t done = 0;
  for (; done + kRows <= rows; done += kRows) {
    product_block<kRows, kVectors>({a.data + done * a.row, a.row, a.column}, b, width, depth, add,
                                   c + done * width);
  }
  for (; done < rows; ++done) {
    product_block<1, kVectors>({a.data + done * a.row, a.row, a.column}, b, width, depth, add,
                               c + done * width);
  }
}

// C [rows, width] = A [rows, depth] B [depth, width]; width is a multiple of kLanes.
SYNCMASK_INLINE void product(const Matrix& a, int64_t rows, const float* b, int64_t width,
                             int64_t depth, float* c) {
  if (depth == 0) std::fill_n(c, rows * width, 0.0f);
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = std::min(kDepth, depth - k);
    const Matrix left{a.data + k * a.column, a.row, a.column};
    int64_t lane = 0;
    for (; lane + 2 * kLanes <= width; lane += 2 * kLanes) {
      product_columns<6, 2>(left, rows, b + k * width + lane, width, part, k > 0, c + lane);
    }
    if (lane < width) {
      product_columns<12, 1>(left, rows, b + k * width + lane, width, part, k > 0, c + lane);
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

// Rows as floats: where they are, or widened into `room` [rows, columns].
template <typename T>
SYNCMASK_INLINE Matrix as_matrix(const T* from, int64_t row, int64_t column, int64_t rows,
                                 int64_t columns, float* room) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* values = from + r * row;
    float* wide = room + r * columns;
    int64_t c = 0;
    for (; column == 1 && c + kLanes <= columns; c += kLanes) {
      Floats value;
      widen(values + c, value);
      store(value, wide + c);
    }
    for (; c < columns; ++c) wide[c] = widen(values[c * column]);
  }
  return {room, columns, 1};
}

SYNCMASK_INLINE Matrix as_matrix(const float* from, int64_t row, int64_t column, int64_t, int64_t,
                                 float*) {
  return {from, row, column};
}

}  // namespace syncmask
