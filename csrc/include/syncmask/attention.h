// Attention of a block of words over all keys of an image, without probabilities in memory: logits
// are held for one head at a time, key by key, the words side by side in vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "syncmask/product.h"

namespace syncmask {

constexpr int64_t kWords = 32;  // of a block: the logits of 257 keys are then 33 KB

SYNCMASK_INLINE int64_t padded(int64_t words) { return (words + kLanes - 1) / kLanes * kLanes; }

// One head's rows of queries, keys or values.
template <typename T>
struct HeadRows {
  const T* data;
  int64_t row, column, rows, columns;
};

// What a thread needs beside the outputs.
struct AttentionRoom {
  float* queries;  // [D, width]
  float* rows;     // [S, max(D, padded(E))], of keys or values that are no vectors of floats
  float* logits;   // [S, width]
  float* output;   // [T, padded(E)], where there are values
  float* factors;  // [width]
};

// logits [S, width], -inf at invalid keys.
template <typename T>
SYNCMASK_INLINE void head_logits(const HeadRows<T>& q, const HeadRows<T>& k, const bool* key_valid,
                                 float scale, int64_t width, const AttentionRoom& room) {
  pack(q.data, q.row, q.column, q.rows, q.columns, scale, room.queries, width);
  const Matrix keys = as_matrix(k.data, k.row, k.column, k.rows, k.columns, 1, room.rows);
  product(keys, k.rows, room.queries, width, width, k.columns, room.logits, width);
  for (int64_t s = 0; key_valid && s < k.rows; ++s) {
    if (!key_valid[s]) std::fill_n(room.logits + s * width, width, -INFINITY);
  }
}

// Turns logits [S, width] into exponentials of their distance to the largest of each word, and
// leaves the factors that make them probabilities: 0 for a word without a valid key.
SYNCMASK_INLINE void exponentials(float* logits, int64_t keys, int64_t width, float* factors) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    float* column = logits + lane;
    Floats top = Floats{} - INFINITY, total = {}, value;
    for (int64_t s = 0; s < keys; ++s) {
      widen(column + s * width, value);
      top = value > top ? value : top;
    }
    top = top == -INFINITY ? Floats{} : top;
    for (int64_t s = 0; s < keys; ++s) {
      widen(column + s * width, value);
      softmax_weight(value - top, value);
      total += value;
      store(value, column + s * width);
    }
    store(total == 0.0f ? Floats{} : 1.0f / total, factors + lane);
  }
}

// means [S, width] += the probabilities.
SYNCMASK_INLINE void add_probabilities(const float* exponentials, const float* factors,
                                       int64_t keys, int64_t width, float* means) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    Floats factor, value, mean;
    widen(factors + lane, factor);
    for (int64_t i = lane; i < keys * width; i += width) {
      widen(exponentials + i, value);
      widen(means + i, mean);
      store(mean + value * factor, means + i);
    }
  }
}

// output [T, E]: the probabilities times the values.
template <typename T>
SYNCMASK_INLINE void weigh_values(const HeadRows<T>& v, int64_t words, int64_t width,
                                  const AttentionRoom& room, T* output) {
  const int64_t columns = padded(v.columns);
  const Matrix values = as_matrix(v.data, v.row, v.column, v.rows, v.columns, kLanes, room.rows);
  const Matrix weights{room.logits, 1, width};
  product(weights, words, values.data, values.row, columns, v.rows, room.output, columns);
  for (int64_t t = 0; t < words; ++t) {
    const float* sums = room.output + t * columns;
    const float factor = room.factors[t];
    for (int64_t e = 0; e < v.columns; ++e) narrow(sums[e] * factor, output + t * v.columns + e);
  }
}

}  // namespace syncmask
