// topk_mask and sync_topk_mask for CPU tensors: rows are independent, a thread takes a range of them.
#include "syncmask/selection.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "tensors.h"

// One row at a time, compiled for each instruction set.
namespace syncmask::cpu {

#define SYNCMASK_SCORE_ROW(T)                                                              \
  SYNCMASK_CLONES void score_row(const Attention<T>& attention, float* patch_scores,       \
                                 float* token_scores, int64_t* words, float* sums,         \
                                 float* totals, float* factors, float* shares) {           \
    score_mean(attention, patch_scores, token_scores, words, sums);                        \
    if (attention.rule != TokenRule::kMax) {                                               \
      score_shares(attention, token_scores, totals, factors, shares);                      \
    }                                                                                      \
  }
SYNCMASK_SCORE_ROW(float)
SYNCMASK_SCORE_ROW(Half)
SYNCMASK_SCORE_ROW(BFloat16)
#undef SYNCMASK_SCORE_ROW

SYNCMASK_CLONES void topk_row(const float* scores, const float* noise, const bool* valid, int64_t n,
                              const Count& count, int64_t row, bool largest, int32_t* keys,
                              bool* mask, int64_t* ids) {
  const int64_t available = order_keys(scores, noise, valid, n, largest, keys);
  mark_best(keys, n, count.of(row, available), mask);
  list_ids(mask, n, ids, count.width);
}

SYNCMASK_CLONES void topk_words(const float* scores, const float* noise, const bool* valid,
                                const int64_t* word_ids, int64_t n, const Count& count, int64_t row,
                                int32_t* keys, int64_t* leaders, bool* words, bool* mask,
                                int64_t* ids) {
  order_keys(scores, noise, valid, n, true, keys);
  mark_words(keys, word_ids, n, count, row, leaders, words, mask);
  list_ids(mask, n, ids, count.width);
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

// One side of a selection: its scores and what it takes to choose among them.
struct Side {
  Rows<float> given, noise;
  Rows<bool> valid;
  Rows<int64_t> k, word_ids;
  int64_t positions;
  Count count;
  Tensor mask, ids, scores;

  Side(const Tensor& like, int64_t batch, int64_t n, const MaybeTensor& given_scores,
       const MaybeTensor& added, const MaybeTensor& valid_positions, const MaybeTensor& words,
       const MaybeTensor& k_of_rows, int64_t num, int64_t den, int64_t width)
      : given(as_float(given_scores), n),
        noise(as_float(added), n),
        valid(valid_positions, n),
        k(k_of_rows, 1),
        word_ids(words, n),
        positions(n),
        count{k.data(), num, den, width},
        mask(empty(like, {batch, n}, ScalarType::Bool)),
        ids(empty(like, {batch, width}, ScalarType::Long)),
        scores(empty(like, {batch, n}, ScalarType::Float)) {}

  float* scores_of(int64_t row) const {
    return static_cast<float*>(scores.mutable_data_ptr()) + row * positions;
  }

  void select(int64_t row, std::vector<int32_t>& keys, std::vector<int64_t>& leaders,
              std::vector<char>& words) const {
    bool* mask_row = static_cast<bool*>(mask.mutable_data_ptr()) + row * positions;
    int64_t* ids_row = static_cast<int64_t*>(ids.mutable_data_ptr()) + row * count.width;
    if (word_ids.data()) {
      syncmask::cpu::topk_words(scores_of(row), noise.row(row), valid.row(row), word_ids.row(row),
                                positions, count, row, keys.data(), leaders.data(),
                                reinterpret_cast<bool*>(words.data()), mask_row, ids_row);
    } else {
      syncmask::cpu::topk_row(scores_of(row), noise.row(row), valid.row(row), positions, count, row,
                              true, keys.data(), mask_row, ids_row);
    }
  }
};

struct Rule {
  int64_t cls_row, token_rule, skip_keys;
};

// Scores of both sides, unless the caller gave them, then both selections, row by row.
template <typename T>
void sync_rows(const Tensor& attn, const Rows<float>& lse, const Rule& rule, const Side& patch,
               const Side& token) {
  const int64_t layers = attn.size(0), batch = attn.size(1), heads = attn.size(2);
  const bool scored = patch.given.data() == nullptr || token.given.data() == nullptr;
  const T* first = static_cast<const T*>(attn.const_data_ptr()) + rule.skip_keys * attn.stride(4);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const int64_t widest = std::max(patch.positions, token.positions);
    std::vector<int32_t> keys(widest);
    std::vector<int64_t> leaders(token.positions);
    std::vector<char> words(token.positions);
    std::vector<const T*> planes(layers * heads);
    std::vector<float> lse_row(lse.data() ? planes.size() * token.positions : 0);
    const bool shared = rule.token_rule != 0 && token.given.data() == nullptr;
    std::vector<int64_t> read(token.positions);
    std::vector<float> sums(syncmask::words_at_once(patch.positions) * patch.positions);
    std::vector<float> totals(shared ? patch.positions : 0), factors(shared ? token.positions : 0);
    std::vector<float> shares(totals.size() * factors.size());
    for (int64_t b = begin; b < end; ++b) {
      float* patch_scores = patch.scores_of(b);
      float* token_scores = token.scores_of(b);
      if (scored) {
        for (int64_t l = 0; l < layers; ++l) {
          for (int64_t h = 0; h < heads; ++h) {
            const int64_t plane = l * heads + h;
            planes[plane] = first + l * attn.stride(0) + b * attn.stride(1) + h * attn.stride(2);
            if (!lse_row.empty()) {
              std::copy_n(lse.data() + ((l * batch + b) * heads + h) * token.positions,
                          token.positions, lse_row.data() + plane * token.positions);
            }
          }
        }
        const auto wanted = static_cast<syncmask::TokenRule>(shared ? rule.token_rule : 0);
        const Attention<T> attention{{planes.data(), layers * heads, attn.stride(3)},
                                     token.positions,
                                     patch.positions,
                                     lse_row.empty() ? nullptr : lse_row.data(),
                                     token.valid.row(b),
                                     patch.valid.row(b),
                                     rule.cls_row,
                                     wanted};
        syncmask::cpu::score_row(attention, patch_scores, token_scores, read.data(),
                                 sums.data(), totals.data(), factors.data(), shares.data());
      }
      if (patch.given.data()) std::copy_n(patch.given.row(b), patch.positions, patch_scores);
      if (token.given.data()) std::copy_n(token.given.row(b), token.positions, token_scores);
      patch.select(b, keys, leaders, words);
      token.select(b, keys, leaders, words);
    }
  });
}

using SyncResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SyncResult sync_topk_mask(Tensor attn, MaybeTensor lse, MaybeTensor token_valid,
                          MaybeTensor patch_valid, int64_t cls_row, int64_t token_rule,
                          int64_t skip_keys, MaybeTensor patch_k, int64_t patch_num,
                          int64_t patch_den, int64_t patch_width, MaybeTensor token_k,
                          int64_t token_num, int64_t token_den, int64_t token_width,
                          MaybeTensor patch_scores, MaybeTensor token_scores,
                          MaybeTensor patch_noise, MaybeTensor token_noise, MaybeTensor word_ids) {
  STD_TORCH_CHECK(attn.dim() == 5, "attn must be [L, B, H, T, S]");
  if (attn.stride(4) != 1) attn = torch::stable::contiguous(attn);
  const int64_t batch = attn.size(1), tokens = attn.size(3), patches = attn.size(4) - skip_keys;
  const Side patch(attn, batch, patches, patch_scores, patch_noise, patch_valid, std::nullopt,
                   patch_k, patch_num, patch_den, patch_width);
  const Side token(attn, batch, tokens, token_scores, token_noise, token_valid, word_ids, token_k,
                   token_num, token_den, token_width);
  const Rows<float> log_sums(as_float(lse), tokens);
  const Rule rule{cls_row, token_rule, skip_keys};
  switch (attn.scalar_type()) {
    case ScalarType::Float:
      sync_rows<float>(attn, log_sums, rule, patch, token);
      break;
    case ScalarType::Half:
      sync_rows<syncmask::Half>(attn, log_sums, rule, patch, token);
      break;
    case ScalarType::BFloat16:
      sync_rows<syncmask::BFloat16>(attn, log_sums, rule, patch, token);
      break;
    default:
      STD_TORCH_CHECK(false, "attn must be float32, float16 or bfloat16");
  }
  return {patch.mask, token.mask, patch.ids, token.ids, patch.scores, token.scores};
}

std::tuple<Tensor, Tensor> topk_mask(Tensor scores, MaybeTensor valid, MaybeTensor k, int64_t num,
                                     int64_t den, int64_t width, bool largest) {
  std::vector<int64_t> sizes(scores.sizes().begin(), scores.sizes().end());
  const int64_t n = sizes.back();
  Tensor mask = empty(scores, sizes, ScalarType::Bool);
  sizes.back() = width;
  Tensor ids = empty(scores, sizes, ScalarType::Long);
  const Rows<float> values(as_float(scores), n);
  const Rows<bool> allowed(valid, n);
  const Rows<int64_t> k_of_rows(k, 1);
  const Count count{k_of_rows.data(), num, den, width};
  const int64_t rows = n > 0 ? scores.numel() / n : ids.numel() / std::max<int64_t>(width, 1);
  bool* masks = static_cast<bool*>(mask.mutable_data_ptr());
  int64_t* id_rows = static_cast<int64_t*>(ids.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(n, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(n);
    for (int64_t row = begin; row < end; ++row) {
      syncmask::cpu::topk_row(values.row(row), nullptr, allowed.row(row), n, count, row, largest,
                              keys.data(), masks + row * n, id_rows + row * width);
    }
  });
  return {mask, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("topk_mask.cpu", TORCH_BOX(&topk_mask));
  library.impl("sync_topk_mask.cpu", TORCH_BOX(&sync_topk_mask));
}
