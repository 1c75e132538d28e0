// sample_negatives for CPU tensors: rows are independent, a thread takes a range of them.
#include "syncmask/negatives.h"

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensors.h"

namespace syncmask::cpu {

// One row, compiled for each instruction set.
SYNCMASK_CLONES void row_noise(const PhiloxKey& key, int64_t row, int64_t n, float* noise) {
  gumbel_row(key, row, n, noise);
}

SYNCMASK_CLONES bool row_choice(const float* sim, const float* noise, int64_t n,
                                const Barred& barred, const Below* below, int32_t* keys,
                                int64_t* id) {
  candidate_keys(sim, noise, n, barred, keys);
  if (below == nullptr) return choose_largest(keys, n, id);
  return choose_below(keys, n, sim[barred.positive], *below, id);
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

// The arguments of a call, and what it writes.
struct Negatives {
  Rows<bool> exclude;
  Rows<int64_t> positive, row_ids, col_ids, seed;
  Rows<float> noise;
  Mode mode;
  Below below;
  int64_t* ids;
  bool* found;

  bool draws() const { return mode == Mode::kMultinomial && noise.data() == nullptr; }

  Barred barred(int64_t row, int64_t own) const {
    return {exclude.row(row), col_ids.data(), row_ids.data() ? *row_ids.row(row) : 0, own};
  }

  PhiloxKey key() const {
    return {static_cast<uint32_t>(seed.data()[0]), static_cast<uint32_t>(seed.data()[1])};
  }
};

// What a thread needs for one row.
struct Room {
  std::vector<float> sim, noise;
  std::vector<int32_t> keys;
};

void choose(const Negatives& all, const float* sim, int64_t n, int64_t row, int64_t own,
            Room& room) {
  const float* noise = all.noise.row(row);
  if (all.draws()) {
    syncmask::cpu::row_noise(all.key(), row, n, room.noise.data());
    noise = room.noise.data();
  }
  const Below* below = all.mode == Mode::kSemiHard ? &all.below : nullptr;
  all.found[row] = syncmask::cpu::row_choice(sim, noise, n, all.barred(row, own), below,
                                             room.keys.data(), all.ids + row);
}

// The own column of a row, or -1: as given, else the diagonal of a square.
int64_t own_column(const Negatives& all, int64_t row, int64_t rows, int64_t n) {
  if (all.positive.data()) return *all.positive.row(row);
  return rows == n ? row : -1;
}

template <typename T>
void choose_rows(const Negatives& all, const Tensor& sim) {
  const int64_t rows = sim.size(0), n = sim.size(1), stride = sim.stride(0);
  const T* first = static_cast<const T*>(sim.const_data_ptr());
  constexpr bool kFloat = std::is_same_v<T, float>;
  const int64_t cells = all.draws() ? 4096 : 16384;
  const int64_t grain = std::max<int64_t>(1, cells / std::max<int64_t>(n, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    Room room;
    room.keys.resize(n);
    room.noise.resize(all.draws() ? n + kRandomWords : 0);
    room.sim.resize(kFloat ? 0 : n);
    for (int64_t row = begin; row < end; ++row) {
      const T* values = first + row * stride;
      const float* wide = room.sim.data();
      if constexpr (kFloat) {
        wide = values;
      } else {
        for (int64_t i = 0; i < n; ++i) room.sim[i] = widen(values[i]);
      }
      choose(all, wide, n, row, own_column(all, row, rows, n), room);
    }
  });
}

std::tuple<Tensor, Tensor> sample_negatives(Tensor sim, MaybeTensor positive, MaybeTensor exclude,
                                            MaybeTensor row_ids, MaybeTensor col_ids, int64_t mode,
                                            double margin, int64_t num, int64_t den,
                                            MaybeTensor seed, MaybeTensor noise) {
  if (sim.stride(1) != 1) sim = torch::stable::contiguous(sim);
  const int64_t rows = sim.size(0), n = sim.size(1);
  Tensor ids = empty(sim, {rows}, ScalarType::Long), found = empty(sim, {rows}, ScalarType::Bool);
  const Negatives all{Rows<bool>(exclude, n),
                            Rows<int64_t>(positive, 1),
                            Rows<int64_t>(row_ids, 1),
                            Rows<int64_t>(col_ids),
                            Rows<int64_t>(seed),
                            Rows<float>(as_float(noise), n),
                            static_cast<Mode>(mode),
                            {static_cast<float>(margin), num, den},
                            data<int64_t>(ids),
                            data<bool>(found)};
  for (int64_t row = 0; row < rows && all.positive.data(); ++row) {
    const int64_t own = *all.positive.row(row);
    STD_TORCH_CHECK(own >= 0 && own < n, "positive must be in [0, N)");
  }
  by_type(sim, [&](auto* type) {
    choose_rows<std::remove_pointer_t<decltype(type)>>(all, sim);
  });
  return {ids, found};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("sample_negatives.cpu", TORCH_BOX(&sample_negatives));
}
