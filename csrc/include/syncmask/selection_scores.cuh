// Scores of patches and words from cross-attention, which is read once. Every block leaves the
// parts of a tile of words and patches; select_kernel combines them in a fixed order. There are no
// atomics, and tiles depend on the numbers of words and patches alone: a row gets the same bits in
// any batch.
#pragma once

#include "syncmask/warp.cuh"

namespace syncmask {

constexpr int kMeanWords = 8, kMeanColumns = 4;
constexpr int kMeanHeads = 4;  // whose loads are under way together

enum class TokenRule : int { kMax = 0, kTextSoftmax = 1, kDual = 2 };

// Cross-attention [layers, batch, heads, words, patches] of any strides.
template <typename T>
struct Attention {
  const T* data;  // the first patch of the first row
  int layers, heads, words, patches;
  int64_t batch, stride_l, stride_b, stride_h, stride_t, stride_p;
  const float* lse;         // [layers, batch, heads, words] or null
  const bool* token_valid;  // [batch, words] or null
  const bool* patch_valid;  // [batch, patches] or null
  int cls_row;              // or -1: the patch score is the mean over valid words
  float* patch_parts;       // [batch, word blocks, patches] or null: no such score is wanted
  float* token_parts;       // [batch, patch blocks, words] or null
};

// What a block scores: words dealt out to its warps in turn, and kColumns patches a lane. They lie
// side by side where kWide, which lets a lane load them at once, else kLanes apart.
template <typename T, int kColumns, bool kWide = false>
struct Tile {
  const Attention<T>& a;
  int64_t batch;
  int word_block, word_blocks, patch_block, patch_blocks;
  bool scored[kColumns];

  __device__ __forceinline__ Tile(const Attention<T>& attention, int words_per_block)
      : a(attention) {
    constexpr int kPatches = kLanes * kColumns;
    patch_blocks = (a.patches + kPatches - 1) / kPatches;
    word_blocks = (a.words + words_per_block - 1) / words_per_block;
    patch_block = blockIdx.x % patch_blocks;
    word_block = blockIdx.x / patch_blocks % word_blocks;
    batch = blockIdx.x / patch_blocks / word_blocks;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      scored[c] = patch(c) < a.patches &&
                  (a.patch_valid == nullptr || a.patch_valid[batch * a.patches + patch(c)]);
    }
  }

  __device__ __forceinline__ int patch(int c) const {
    const int first = patch_block * kColumns * kLanes;
    return first + (kWide ? lane_id() * kColumns + c : c * kLanes + lane_id());
  }

  __device__ __forceinline__ bool counts(int word) const {
    return word < a.words && (a.token_valid == nullptr || a.token_valid[batch * a.words + word]);
  }
  // Whether the word takes part in the scores of patches.
  __device__ __forceinline__ bool weighs(int word) const {
    if (a.patch_parts == nullptr) return false;
    return a.cls_row < 0 ? counts(word) : word == a.cls_row;
  }
  __device__ __forceinline__ bool reads(int word) const {
    return weighs(word) || (a.token_parts != nullptr && counts(word));
  }

  // The lane's first patch of a word in the first plane.
  __device__ __forceinline__ const T* row(int word) const {
    return a.data + batch * a.stride_b + word * a.stride_t + patch(0) * a.stride_p;
  }

  // The weights of a word, 0 where they are not wanted.
  __device__ __forceinline__ void load(const T* row, bool wanted, float (&values)[kColumns]) const {
    struct alignas(kColumns * sizeof(T)) Pack {
      T at[kColumns];
    };
    Pack pack;
    if (kWide && wanted && patch(0) < a.patches) pack = *reinterpret_cast<const Pack*>(row);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      values[c] = 0.0f;
      if (wanted && scored[c]) values[c] = widen(kWide ? pack.at[c] : row[c * kLanes * a.stride_p]);
    }
  }

  // The factor that turns a probability of a word into its unnormalised weight among words:
  // exp(lse) up to a common factor, 1 without lse, 0 for words that do not count.
  __device__ __forceinline__ float factor(int plane, int word, bool counted) const {
    if (a.lse == nullptr) return counted ? 1.0f : 0.0f;
    const int layer = plane / a.heads, head = plane % a.heads;
    const float* lse = a.lse + ((layer * a.batch + batch) * a.heads + head) * a.words;
    float top = -INFINITY;
    for (int other = lane_id(); other < a.words; other += kLanes) {
      if (counts(other)) top = larger(top, lse[other]);
    }
    top = warp_max(top);
    return counted ? expf(lse[word] - (top == -INFINITY ? 0.0f : top)) : 0.0f;
  }

  // Sums of all warps, added up in their order.
  template <int kWarps>
  __device__ __forceinline__ static void add_warps(float (&sums)[kColumns],
                                                   float (&shared)[kWarps][kLanes * kColumns]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      shared[warp_id()][c * kLanes + lane_id()] = sums[c];
      sums[c] = 0.0f;
    }
    __syncthreads();
    for (int warp = 0; warp < warp_count(); ++warp) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c] += shared[warp][c * kLanes + lane_id()];
    }
  }

  // Leaves the parts of patches: their sums over the words of the block.
  template <int kWarps>
  __device__ __forceinline__ void leave_patches(float (&sums)[kColumns],
                                                float (&shared)[kWarps][kLanes * kColumns]) const {
    if (a.patch_parts == nullptr) return;
    add_warps(sums, shared);
    if (warp_id() != 0) return;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (patch(c) >= a.patches) continue;
      a.patch_parts[(batch * word_blocks + word_block) * a.patches + patch(c)] = sums[c];
    }
  }

  // Leaves the part of a word of the caller's warp: the maximum or sum over the patches.
  __device__ __forceinline__ void leave_word(int word, const float (&values)[kColumns],
                                             bool by_max) const {
    float part = by_max ? -INFINITY : 0.0f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (patch(c) >= a.patches) continue;
      part = by_max ? larger(part, values[c]) : part + values[c];
    }
    part = by_max ? warp_max(part) : warp_sum(part);
    if (lane_id() == 0) {
      a.token_parts[(batch * patch_blocks + patch_block) * a.words + word] =
          counts(word) ? part : 0.0f;
    }
  }
};

// Patches by the mean or the CLS row, words by the maximum. A warp takes one word. kWide needs all
// patches of a lane aligned.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kMeanWords* kLanes, 3) mean_kernel(Attention<T> attention) {
  __shared__ float shared[kMeanWords][kLanes * kMeanColumns];
  const Tile<T, kMeanColumns, kWide> tile(attention, warp_count());
  const int word = tile.word_block * warp_count() + warp_id();
  float sums[kMeanColumns] = {};
  if (tile.reads(word)) {
    const T* layer = tile.row(word);
    for (int l = 0; l < attention.layers; ++l, layer += attention.stride_l) {
      for (int h = 0; h < attention.heads; h += kMeanHeads) {
        float values[kMeanHeads][kMeanColumns];
#pragma unroll
        for (int i = 0; i < kMeanHeads; ++i) {
          const T* head = layer + (h + i) * attention.stride_h;
          tile.load(head, h + i < attention.heads, values[i]);
        }
#pragma unroll
        for (int i = 0; i < kMeanHeads; ++i) {
#pragma unroll
          for (int c = 0; c < kMeanColumns; ++c) sums[c] += values[i][c];
        }
      }
    }
  }
  if (attention.token_parts != nullptr && word < attention.words) {
    tile.leave_word(word, sums, true);
  }
  const bool weighs = tile.weighs(word);
#pragma unroll
  for (int c = 0; c < kMeanColumns; ++c) sums[c] = weighs ? sums[c] : 0.0f;
  tile.leave_patches(sums, shared);
}

// Words by the share that each patch gives them of all words: the softmax over words of
// log attn + lse. A block has all words of its patches; a warp takes kWords of them, and lane i
// looks after the i-th.
template <typename T, int kWarps, int kWords, int kColumns>
__global__ void __launch_bounds__(kWarps* kLanes, 1)
    share_kernel(Attention<T> attention, bool dual) {
  static_assert(kWords <= kLanes);
  __shared__ float shared[2][kWarps][kLanes * kColumns];  // by turns, so that one barrier is enough
  const Tile<T, kColumns> tile(attention, attention.words);
  const int stride = warp_count(), first = warp_id(), own = first + lane_id() * stride;
  const bool mine = lane_id() < kWords;
  const unsigned counted = __ballot_sync(kAllLanes, mine && tile.counts(own));
  const unsigned weighed = __ballot_sync(kAllLanes, mine && tile.weighs(own));

  const auto row = [&](int plane) {
    return tile.row(first) + plane / attention.heads * attention.stride_l +
           plane % attention.heads * attention.stride_h;
  };
  const int64_t step = stride * attention.stride_t;

  const int planes = attention.layers * attention.heads;
  float values[kWords][kColumns] = {}, shares[kWords][kColumns] = {}, sums[kColumns] = {};
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    tile.load(row(0) + i * step, (counted | weighed) >> i & 1, values[i]);
  }
  for (int plane = 0; plane < planes; ++plane) {
    const float factor = tile.factor(plane, own, counted >> lane_id() & 1);
    float totals[kColumns] = {};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float lift = __shfl_sync(kAllLanes, factor, i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lift != 0.0f) totals[c] += values[i][c] * lift;
        if (weighed >> i & 1) sums[c] += values[i][c];
      }
    }
    const T* next = row(plane + 1);
    tile.add_warps(totals, shared[plane & 1]);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float lift = __shfl_sync(kAllLanes, factor, i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        // A patch that no word looks at is shared by none.
        const float total = totals[c] == 0.0f ? 1.0f : totals[c];
        const float share = (lift == 0.0f ? 0.0f : values[i][c] * lift) / total;
        shares[i][c] += dual ? share * values[i][c] : share;
      }
      // The next plane is on its way while this one is worked at.
      tile.load(next + i * step, plane + 1 < planes && ((counted | weighed) >> i & 1), values[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (first + i * stride < attention.words) tile.leave_word(first + i * stride, shares[i], !dual);
  }
  tile.leave_patches(sums, shared[planes & 1]);
}

}  // namespace syncmask
