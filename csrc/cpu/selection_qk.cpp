// sync_scores_qk and max_similarity for CPU tensors: a thread takes a range of examples, or of their
// blocks of patches.
#include "syncmask/selection_qk.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace syncmask::cpu {

constexpr int64_t kPatches = 64;  // of a block, whose similarities stay in the cache

// A head, or a block of patches; compiled for each instruction set.
#define SYNCMASK_SCORE_HEAD(T)                                                                   \
  SYNCMASK_CLONES void score_head(const HeadRows<T>& q, const HeadRows<T>& k,                    \
                                  const bool* key_valid, float scale, int64_t width,             \
                                  const AttentionRoom& room, const float* counted,               \
                                  TokenRule rule, const float* distance, float* shares,          \
                                  const HeadSums& sums) {                                        \
    head_logits(q, k, key_valid, scale, width, room);                                            \
    add_head_scores(room.logits, k.rows, width, counted, rule, distance, room.factors, shares,   \
                    sums);                                                                       \
  }

#define SYNCMASK_PACK_TOKENS(T)                                                                  \
  SYNCMASK_CLONES void pack_tokens(const HeadRows<T>& tokens, float* packed, int64_t width) {    \
    pack(tokens.data, tokens.row, tokens.column, tokens.rows, tokens.columns, 1.0f, packed,      \
         width);                                                                                 \
  }

#define SYNCMASK_MATCH_PATCHES(T)                                                                \
  SYNCMASK_CLONES void match_patches(const HeadRows<T>& patches, const float* tokens,            \
                                     int64_t width, int64_t words, const bool* valid,            \
                                     float* rows, float* similarity, float* scores,              \
                                     int64_t* ids) {                                             \
    const Matrix left = as_matrix(patches.data, patches.row, patches.column, patches.rows,       \
                                  patches.columns, 1, rows);                                     \
    product(left, patches.rows, tokens, width, width, patches.columns, similarity, width);       \
    for (int64_t p = 0; p < patches.rows; ++p) {                                                 \
      best_token(similarity + p * width, valid, words, scores + p, ids + p);                     \
    }                                                                                            \
  }

#define SYNCMASK_ALL(T)   \
  SYNCMASK_SCORE_HEAD(T)  \
  SYNCMASK_PACK_TOKENS(T) \
  SYNCMASK_MATCH_PATCHES(T)
SYNCMASK_ALL(float)
SYNCMASK_ALL(Half)
SYNCMASK_ALL(BFloat16)
#undef SYNCMASK_ALL
#undef SYNCMASK_MATCH_PATCHES
#undef SYNCMASK_PACK_TOKENS
#undef SYNCMASK_SCORE_HEAD

SYNCMASK_CLONES void finish_row(const HeadSums& sums, const float* counted,
                                const bool* patch_valid, int64_t patches, int64_t tokens,
                                int64_t width, int64_t cls_row, TokenRule rule, float heads,
                                float* row, float* patch_scores, float* token_scores) {
  finish_scores(sums, counted, patch_valid, patches, tokens, width, cls_row, rule, heads, row,
                patch_scores, token_scores);
}

struct ScoreRule {
  float scale;
  int64_t cls_row;
  TokenRule token;
  int64_t skip_keys;
};

template <typename T>
void score(const Tensor& q, const Tensor& k, const Rows<float>& distance,
           const Rows<bool>& key_valid, const Rows<bool>& token_valid,
           const Rows<bool>& patch_valid, const ScoreRule& rule, Tensor& patch_scores,
           Tensor& token_scores) {
  const int64_t layers = q.size(0), batch = q.size(1), heads = q.size(2), tokens = q.size(3);
  const int64_t keys = k.size(3), dim = q.size(4), patches = keys - rule.skip_keys;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const int64_t width = padded(tokens), size = keys * width;
    const bool shared = rule.token != TokenRule::kMax;
    std::vector<float> queries(dim * width), logits(size), factors(width), counted(width);
    std::vector<float> rows(keys * dim);
    std::vector<float> means(size), share(shared ? size : 0), shares(shared ? size : 0);
    std::vector<float> weighted(distance.data() ? size : 0);
    const AttentionRoom room{queries.data(), rows.data(), logits.data(), nullptr, factors.data()};
    for (int64_t b = begin; b < end; ++b) {
      const bool* valid = token_valid.row(b);
      for (int64_t t = 0; t < tokens; ++t) counted[t] = valid == nullptr || valid[t];
      for (auto* sums : {&means, &shares, &weighted}) std::fill(sums->begin(), sums->end(), 0.0f);
      const auto sums_from = [&](int64_t key) {
        return HeadSums{means.data() + key * width, shared ? shares.data() + key * width : nullptr,
                        distance.data() ? weighted.data() + key * width : nullptr};
      };
      for (int64_t l = 0; l < layers; ++l) {
        for (int64_t h = 0; h < heads; ++h) {
          score_head(head_rows<T>(q, l, b, h), head_rows<T>(k, l, b, h), key_valid.row(b),
                     rule.scale, width, room, counted.data(), rule.token,
                     distance.row((l * batch + b) * heads + h), share.data(), sums_from(0));
        }
      }
      finish_row(sums_from(rule.skip_keys), counted.data(), patch_valid.row(b), patches, tokens,
                 width, rule.cls_row, rule.token, static_cast<float>(layers * heads),
                 factors.data(), data<float>(patch_scores) + b * patches,
                 data<float>(token_scores) + b * tokens);
    }
  });
}

template <typename T>
void match(const Tensor& patches, const Tensor& tokens, const Rows<bool>& valid, Tensor& scores,
           Tensor& ids) {
  const int64_t batch = patches.size(0), count = patches.size(1), dim = patches.size(2);
  const int64_t words = tokens.size(1), width = padded(words);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> packed(dim * width), similarity(kPatches * width);
    std::vector<float> rows(kPatches * dim);
    for (int64_t b = begin; b < end; ++b) {
      const HeadRows<T> words_of{static_cast<const T*>(tokens.const_data_ptr()) + b * tokens.stride(0),
                                 tokens.stride(1), tokens.stride(2), words, dim};
      pack_tokens(words_of, packed.data(), width);
      for (int64_t p = 0; p < count; p += kPatches) {
        const HeadRows<T> block{static_cast<const T*>(patches.const_data_ptr()) +
                                    b * patches.stride(0) + p * patches.stride(1),
                                patches.stride(1), patches.stride(2), std::min(count - p, kPatches),
                                dim};
        match_patches(block, packed.data(), width, words, valid.row(b), rows.data(),
                      similarity.data(), data<float>(scores) + b * count + p,
                      data<int64_t>(ids) + b * count + p);
      }
    }
  });
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

std::tuple<Tensor, Tensor> sync_scores_qk(Tensor q, Tensor k, MaybeTensor distance,
                                          MaybeTensor key_valid, MaybeTensor token_valid,
                                          MaybeTensor patch_valid, double scale, int64_t cls_row,
                                          int64_t token_rule, int64_t skip_keys) {
  const int64_t tokens = q.size(3), keys = k.size(3);
  Tensor patch_scores = empty(q, {q.size(1), keys - skip_keys}, ScalarType::Float);
  Tensor token_scores = empty(q, {q.size(1), tokens}, ScalarType::Float);
  const ScoreRule rule{static_cast<float>(scale), cls_row,
                       static_cast<syncmask::TokenRule>(token_rule), skip_keys};
  const Rows<float> distances(as_float(distance), keys);
  const Rows<bool> valid_keys(key_valid, keys), valid_tokens(token_valid, tokens);
  const Rows<bool> valid_patches(patch_valid, keys - skip_keys);
  by_type(q, [&](auto* type) {
    score<std::remove_pointer_t<decltype(type)>>(q, k, distances, valid_keys, valid_tokens,
                                                 valid_patches, rule, patch_scores, token_scores);
  });
  return {patch_scores, token_scores};
}

std::tuple<Tensor, Tensor> max_similarity(Tensor patches, Tensor tokens, MaybeTensor token_valid) {
  Tensor scores = empty(patches, {patches.size(0), patches.size(1)}, ScalarType::Float);
  Tensor ids = empty(patches, {patches.size(0), patches.size(1)}, ScalarType::Long);
  const Rows<bool> valid(token_valid, tokens.size(1));
  by_type(patches, [&](auto* type) {
    match<std::remove_pointer_t<decltype(type)>>(patches, tokens, valid, scores, ids);
  });
  return {scores, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("sync_scores_qk.cpu", TORCH_BOX(&sync_scores_qk));
  library.impl("max_similarity.cpu", TORCH_BOX(&max_similarity));
}
