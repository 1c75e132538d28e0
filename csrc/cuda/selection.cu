// topk_mask and sync_topk_mask for CUDA tensors: one launch, and at most two.
#include "syncmask/launch.cuh"
#include "syncmask/selection.cuh"
#include "syncmask/selection_scores.cuh"

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using namespace syncmask;

constexpr int kHeld = 8;  // positions that a lane holds in registers
constexpr int kWarpRow = kHeld * kLanes;
constexpr int kBlockRow = kMaxWarps * kWarpRow;
constexpr int kRowsPerBlock = 4;
constexpr int64_t kLongestRow = 1 << 30;

unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "too many rows for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

int row_size(int64_t positions) {
  STD_TORCH_CHECK(positions <= kLongestRow, "rows have at most 2**30 positions, got ", positions);
  return static_cast<int>(positions);
}

// Calls launch(block, held, blocks, threads): the constants of the kernel for rows of this size, and
// its grid.
template <typename Launch>
void with_team(int64_t rows, int positions, const Launch& launch) {
  using Warp = std::false_type;
  using Block = std::true_type;
  if (positions <= kWarpRow) {
    const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
    launch(Warp{}, std::integral_constant<int, kHeld>{}, grid(blocks), kRowsPerBlock * kLanes);
  } else if (positions <= kBlockRow) {
    const int warps = (positions + kWarpRow - 1) / kWarpRow;
    launch(Block{}, std::integral_constant<int, kHeld>{}, grid(rows), warps * kLanes);
  } else {
    const int threads = kMaxWarps * kLanes;
    launch(Block{}, std::integral_constant<int, 0>{}, grid(rows), threads);
  }
}

std::tuple<Tensor, Tensor> topk_mask(Tensor scores, MaybeTensor valid, MaybeTensor k, int64_t num,
                                     int64_t den, int64_t width, bool largest) {
  std::vector<int64_t> sizes(scores.sizes().begin(), scores.sizes().end());
  const int positions = row_size(sizes.back());
  Tensor mask = empty(scores, sizes, ScalarType::Bool);
  sizes.back() = width;
  Tensor ids = empty(scores, sizes, ScalarType::Long);
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  if (rows == 0) return {mask, ids};

  const Stream stream(scores);
  const Tensor values = torch::stable::contiguous(scores);
  const Rows<bool> allowed(valid);
  const Rows<int64_t> k_of_rows(k);
  const Count count{k_of_rows.data(), num, den, width};
  bool* masks = data<bool>(mask);
  int64_t* id_rows = data<int64_t>(ids);
  with_type("scores", values, [&]<typename T>(T) {
    const Scores<T> given{static_cast<const T*>(values.const_data_ptr()), nullptr, allowed.data(),
                          nullptr, positions, largest};
    with_team(rows, positions, [&](auto block, auto held, unsigned blocks, int threads) {
      topk_kernel<T, block(), held()>
          <<<blocks, threads, 0, stream>>>(given, rows, count, masks, id_rows);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {mask, ids};
}

// What the caller says about one side of sync_topk_mask.
struct SideOptions {
  MaybeTensor scores, noise, valid, word_ids, k;
  int64_t num, den, width;
};

// The tensors of one side, and the kernel's view of them.
class SideTensors {
 public:
  const Tensor mask, ids, scores;

  // `blocks`: how many parts the score kernel leaves of each score.
  SideTensors(const Tensor& like, int64_t rows, int positions, int blocks,
              const SideOptions& options)
      : mask(empty(like, {rows, positions}, ScalarType::Bool)),
        ids(empty(like, {rows, options.width}, ScalarType::Long)),
        scores(empty(like, {rows, positions}, ScalarType::Float)),
        positions_(positions),
        blocks_(options.scores ? 1 : blocks),
        given_(as_float(options.scores)),
        noise_(as_float(options.noise)),
        valid_(options.valid),
        word_ids_(options.word_ids),
        k_(options.k),
        count_{k_.data(), options.num, options.den, options.width},
        parts_(empty(like, {options.scores ? 0 : rows, blocks, positions}, ScalarType::Float)),
        pieces_(empty(like, {options.word_ids ? rows : 0, positions}, ScalarType::Long)) {}

  // Where the score kernel leaves its parts; null where the caller gave the scores.
  float* parts() const { return given_.data() ? nullptr : data<float>(parts_); }
  const bool* valid() const { return valid_.data(); }

  Side view(float planes, bool by_max, const bool* averaged, int words) const {
    static_assert(sizeof(Candidate) == sizeof(int64_t));
    const bool own = given_.data() != nullptr;
    return {.parts = own ? given_.data() : parts(),
            .blocks = blocks_,
            .size = positions_,
            .by_max = by_max,
            .divisor = own ? 1.0f : planes,
            .averaged = averaged,
            .words = own ? 0 : words,
            .noise = noise_.data(),
            .valid = valid_.data(),
            .word_ids = word_ids_.data(),
            .pieces = reinterpret_cast<Candidate*>(data<int64_t>(pieces_)),
            .count = count_,
            .mask = data<bool>(mask),
            .ids = data<int64_t>(ids),
            .scores = data<float>(scores)};
  }

 private:
  int positions_, blocks_;
  Rows<float> given_, noise_;
  Rows<bool> valid_;
  Rows<int64_t> word_ids_, k_;
  Count count_;
  Tensor parts_, pieces_;
};

// Whether the patches of a lane of mean_kernel are aligned in every row.
template <typename T>
bool aligned(const Attention<T>& a) {
  const auto address = reinterpret_cast<uintptr_t>(a.data);
  const int64_t odd = a.patches | a.stride_l | a.stride_b | a.stride_h | a.stride_t;
  return a.stride_p == 1 && odd % kMeanColumns == 0 && address % (kMeanColumns * sizeof(T)) == 0;
}

// How the score kernels cut up words and patches. A block has all words where they are normalised
// over: its warps take 8 of them each, or 16 of fewer patches.
struct Tiling {
  bool shared, many;
  int word_blocks, patch_blocks;

  Tiling(int words, int patches, bool shared_) : shared(shared_), many(words > 128) {
    const int tile_words = shared ? std::max(words, 1) : kMeanWords;
    const int columns = !shared ? kMeanColumns : many ? 1 : 2;
    word_blocks = (words + tile_words - 1) / tile_words;
    patch_blocks = (patches + columns * kLanes - 1) / (columns * kLanes);
  }

  template <typename T>
  void score(const Attention<T>& attention, bool dual, cudaStream_t stream) const {
    const unsigned blocks = grid(attention.batch * word_blocks * patch_blocks);
    const int words = attention.words;
    if (blocks == 0) return;
    if (!shared && aligned(attention)) {
      mean_kernel<T, true><<<blocks, kMeanWords * kLanes, 0, stream>>>(attention);
    } else if (!shared) {
      mean_kernel<T, false><<<blocks, kMeanWords * kLanes, 0, stream>>>(attention);
    } else if (many) {
      share_kernel<T, 16, 16, 1>
          <<<blocks, (words + 15) / 16 * kLanes, 0, stream>>>(attention, dual);
    } else {
      share_kernel<T, 16, 8, 2>
          <<<blocks, (words + 7) / 8 * kLanes, 0, stream>>>(attention, dual);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

using SyncResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SyncResult sync_topk_mask(Tensor attn, MaybeTensor lse, MaybeTensor token_valid,
                          MaybeTensor patch_valid, int64_t cls_row, int64_t token_rule,
                          int64_t skip_keys, MaybeTensor patch_k, int64_t patch_num,
                          int64_t patch_den, int64_t patch_width, MaybeTensor token_k,
                          int64_t token_num, int64_t token_den, int64_t token_width,
                          MaybeTensor patch_scores, MaybeTensor token_scores,
                          MaybeTensor patch_noise, MaybeTensor token_noise, MaybeTensor word_ids) {
  STD_TORCH_CHECK(attn.dim() == 5, "attn must be [L, B, H, T, S]");
  const Stream stream(attn);
  const int64_t batch = attn.size(1);
  const int layers = row_size(attn.size(0)), heads = row_size(attn.size(2));
  const int words = row_size(attn.size(3)), patches = row_size(attn.size(4) - skip_keys);
  const auto rule = static_cast<TokenRule>(token_rule);
  const Tiling tiling(words, patches, rule != TokenRule::kMax && !token_scores);
  const SideTensors patch(attn, batch, patches, tiling.word_blocks,
                          {.scores = patch_scores,
                           .noise = patch_noise,
                           .valid = patch_valid,
                           .k = patch_k,
                           .num = patch_num,
                           .den = patch_den,
                           .width = patch_width});
  const SideTensors token(attn, batch, words, tiling.patch_blocks,
                          {.scores = token_scores,
                           .noise = token_noise,
                           .valid = token_valid,
                           .word_ids = word_ids,
                           .k = token_k,
                           .num = token_num,
                           .den = token_den,
                           .width = token_width});
  const SyncResult result{patch.mask, token.mask, patch.ids, token.ids, patch.scores, token.scores};
  if (batch == 0) return result;

  const Rows<float> log_sums(as_float(lse));
  with_type("attn", attn, [&]<typename T>(T) {
    if (!patch.parts() && !token.parts()) return;
    const Attention<T> attention{
        .data = static_cast<const T*>(attn.const_data_ptr()) + skip_keys * attn.stride(4),
        .layers = layers,
        .heads = heads,
        .words = words,
        .patches = patches,
        .batch = batch,
        .stride_l = attn.stride(0),
        .stride_b = attn.stride(1),
        .stride_h = attn.stride(2),
        .stride_t = attn.stride(3),
        .stride_p = attn.stride(4),
        .lse = log_sums.data(),
        .token_valid = token.valid(),
        .patch_valid = patch.valid(),
        .cls_row = static_cast<int>(cls_row),
        .patch_parts = patch.parts(),
        .token_parts = token.parts()};
    tiling.score(attention, rule == TokenRule::kDual, stream);
  });
  const float planes = static_cast<float>(layers) * static_cast<float>(heads);
  const Side patch_side = patch.view(planes, false, token.valid(), cls_row < 0 ? words : 0);
  const Side token_side = token.view(planes, rule != TokenRule::kDual, nullptr, 0);
  with_team(batch, std::max(words, patches), [&](auto block, auto held, unsigned blocks, int size) {
    select_kernel<block(), held()>
        <<<dim3(blocks, 2), size, 0, stream>>>(patch_side, token_side, batch);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, SYNCMASK_CUDA_KEY, library) {
  library.impl("topk_mask.cuda", TORCH_BOX(&topk_mask));
  library.impl("sync_topk_mask.cuda", TORCH_BOX(&sync_topk_mask));
}
