// Instructions that touch memory, wait, or are carried out by a whole warp.
#include <algorithm>
#include <array>

#include "halves.h"
#include "ptx_define.h"

namespace gpu {
namespace {

// ---- loads, stores, atomics ----

uint64_t address(const Machine& machine, const Instruction& i, int slot) {
  return machine.read<uint64_t>(i.slots[slot]) + uint64_t(i.immediate);
}

// Shared memory is addressed by 32 bits.
template <Space space>
uint64_t address_in(const Machine& machine, const Instruction& i, int slot) {
  const uint64_t whole = address(machine, i, slot);
  return space == Space::kShared ? uint32_t(whole) : whole;
}

template <Space space, class T, int n>
void load(Machine& machine, const Instruction& i) {
  T values[n];
  machine.memory->read(space, address_in<space>(machine, i, n), values, sizeof values, i.line);
  using Held = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  for (int k = 0; k < n; ++k) machine.write<Held>(i.slots[k], values[k]);
}

template <Space space, class T, int n>
void store(Machine& machine, const Instruction& i) {
  T values[n];
  for (int k = 0; k < n; ++k) values[k] = machine.read<T>(i.slots[1 + k]);
  machine.memory->write(space, address_in<space>(machine, i, 0), values, sizeof values, i.line);
}

template <Space space, class T>
void define_vectors(Operations& all, std::string_view where, std::string_view type) {
  put(all, {"ld", where, type}, load<space, T, 1>);
  put(all, {"st", where, type}, store<space, T, 1>);
  put(all, {"ld", where, ".v2", type}, load<space, T, 2>);
  put(all, {"st", where, ".v2", type}, store<space, T, 2>);
  put(all, {"ld", where, ".v4", type}, load<space, T, 4>);
  put(all, {"st", where, ".v4", type}, store<space, T, 4>);
}

// The old value goes to the first operand, `function` of it and the other operands to memory.
template <Space space, class T, class Function>
Operation atomic(Function) {
  return [](Machine& machine, const Instruction& i) {
    char* at = machine.memory->atomic(space, address_in<space>(machine, i, 1), sizeof(T), i.line);
    T old;
    memcpy(&old, at, sizeof old);
    T value;
    if constexpr (std::is_invocable_v<Function, T, T, T>) {
      value = Function{}(old, machine.read<T>(i.slots[2]), machine.read<T>(i.slots[3]));
    } else {
      value = Function{}(old, machine.read<T>(i.slots[2]));
    }
    memcpy(at, &value, sizeof value);
    machine.write<T>(i.slots[0], old);
  };
}

template <Space space, class T>
void define_atomics(Operations& all, std::string_view where, std::string_view type) {
  put(all, {"atom", where, ".add", type},
      atomic<space, T>([](T old, T value) { return T(old + value); }));
  put(all, {"atom", where, ".min", type},
      atomic<space, T>([](T old, T value) { return std::min(old, value); }));
  put(all, {"atom", where, ".max", type},
      atomic<space, T>([](T old, T value) { return std::max(old, value); }));
  put(all, {"atom", where, ".exch", type}, atomic<space, T>([](T, T value) { return value; }));
  put(all, {"atom", where, ".cas", type},
      atomic<space, T>([](T old, T wanted, T value) { return old == wanted ? value : old; }));
  if constexpr (std::is_integral_v<T>) {
    put(all, {"atom", where, ".and", type},
        atomic<space, T>([](T old, T value) { return T(old & value); }));
    put(all, {"atom", where, ".or", type},
        atomic<space, T>([](T old, T value) { return T(old | value); }));
    put(all, {"atom", where, ".xor", type},
        atomic<space, T>([](T old, T value) { return T(old ^ value); }));
    put(all, {"atom", where, ".inc", type},
        atomic<space, T>([](T old, T most) { return old >= most ? T(0) : T(old + 1); }));
  }
}

template <Space space>
void define_space(Operations& all, std::string_view where) {
  define_vectors<space, uint8_t>(all, where, ".b8");
  define_vectors<space, uint16_t>(all, where, ".b16");
  define_vectors<space, uint32_t>(all, where, ".b32");
  define_vectors<space, uint64_t>(all, where, ".b64");
  define_vectors<space, int8_t>(all, where, ".s8");
  define_vectors<space, int16_t>(all, where, ".s16");
  define_vectors<space, int32_t>(all, where, ".s32");
  if constexpr (space != Space::kPrivate) {
    define_atomics<space, uint32_t>(all, where, ".u32");
    define_atomics<space, uint32_t>(all, where, ".b32");
    define_atomics<space, int32_t>(all, where, ".s32");
    define_atomics<space, uint64_t>(all, where, ".u64");
    define_atomics<space, uint64_t>(all, where, ".b64");
    define_atomics<space, float>(all, where, ".f32");
    define_atomics<space, double>(all, where, ".f64");
  }
}

// Slots: where to in shared memory, where from, how many bytes, how many of them to read.
void copy_later(Machine& machine, const Instruction& i) {
  machine.copies.back().push_back(
      {machine.read<uint32_t>(i.slots[0]), machine.read<uint64_t>(i.slots[1]),
       machine.read<uint32_t>(i.slots[3]), machine.read<uint32_t>(i.slots[2]), i.line});
}

void copy_groups(Machine& machine, size_t but_the_last) {
  while (machine.copies.size() > but_the_last) {
    for (const Copy& copy : machine.copies.front()) {
      char bytes[16] = {};
      if (copy.bytes > 0) {
        machine.memory->read(Space::kGlobal, copy.from, bytes, copy.bytes, copy.line);
      }
      machine.memory->write(Space::kShared, copy.to, bytes, copy.filled, copy.line);
    }
    machine.copies.pop_front();
  }
}

// ---- barriers and warps ----

void pass_barrier(Machine& machine, const Instruction& i) {
  barrier(i.line);
  ++machine.memory->progress[thread->number].block;
}

template <class Function>
Operation vote_of_block(Function) {
  return [](Machine& machine, const Instruction& i) {
    const int votes = barrier(i.line, machine.read<bool>(i.slots[1]));
    ++machine.memory->progress[thread->number].block;
    machine.write<uint32_t>(i.slots[0], Function{}(votes, int(block->grid.threads.count())));
  };
}

void pass_warp_barrier(Machine& machine, const Instruction& i) {
  uint32_t& passed = machine.memory->progress[thread->number].warp;
  const Fold latest = [](uint32_t a, uint32_t b) { return std::max(a, b); };
  passed = 1 + reduce(latest, passed, machine.read<uint32_t>(i.slots[0]), i.line);
}

// Slots: result, whether the source is in range, value, lane or distance, clamp and segments, mask.
template <char mode>
void shuffle_lanes(Machine& machine, const Instruction& i) {
  const int by = int(machine.read<uint32_t>(i.slots[3]) & 31);
  const int control = int(machine.read<uint32_t>(i.slots[4]));
  const int lane = thread->lane(), segment = control >> 8 & 31, clamp = control & 31;
  const int first = lane & segment, last = first | (clamp & ~segment);
  const int from = mode == 'u'   ? lane - by
                   : mode == 'd' ? lane + by
                   : mode == 'b' ? lane ^ by
                                 : first | (by & ~segment);
  const bool inside = mode == 'u' ? from >= last : from <= last;
  const uint32_t value = machine.read<uint32_t>(i.slots[2]);
  const uint32_t mask = machine.read<uint32_t>(i.slots[5]);
  machine.write<uint32_t>(i.slots[0], uint32_t(shuffle(value, inside ? from : lane, mask, i.line)));
  machine.write<bool>(i.slots[1], inside);
}

template <class Function>
Operation vote(Function) {
  return [](Machine& machine, const Instruction& i) {
    const uint32_t mask = machine.read<uint32_t>(i.slots[2]);
    const uint32_t votes = ballot(machine.read<bool>(i.slots[1]), mask, i.line);
    machine.write<uint32_t>(i.slots[0], uint32_t(Function{}(votes, mask)));
  };
}

template <class T, class Function>
Operation reduce_lanes(Function) {
  return [](Machine& machine, const Instruction& i) {
    const Fold fold = [](uint32_t a, uint32_t b) { return uint32_t(Function{}(T(a), T(b))); };
    machine.write<uint32_t>(i.slots[0], reduce(fold, machine.read<uint32_t>(i.slots[1]),
                                               machine.read<uint32_t>(i.slots[2]), i.line));
  };
}

template <class T>
void match_lanes(Machine& machine, const Instruction& i) {
  machine.write<uint32_t>(i.slots[0], match_any(machine.read<T>(i.slots[1]),
                                                machine.read<uint32_t>(i.slots[2]), i.line));
}

// ---- matrices that a warp holds together ----

constexpr uint32_t kWholeWarp = ~0u;

struct Call {
  Machine* machine;
  const Instruction* instruction;
  template <class T>
  T read(int slot) const {
    return machine->read<T>(instruction->slots[slot]);
  }
};

const Call& call_of(void** arguments, int lane) { return *static_cast<Call*>(arguments[lane]); }

// tf32 is a float of which the last 13 bits are not looked at.
struct TensorFloat {
  uint32_t word;
  operator double() const { return bits<float>(word & 0xFFFFE000); }
};

template <class T>
double element(uint32_t word, int which) {
  if constexpr (sizeof(T) == 4) {
    return bits<T>(word);
  } else {
    return bits<T>(uint16_t(word >> 16 * which));
  }
}

// D = A B + C for m16n8k<depth>: the words of row r of A are with lanes 4 (r % 8) .. + 3, those of
// column c of B with lanes 4 c .. + 3. Slots: D (4), A, B, C (4). One rounding, at the end.
template <class T, int depth>
void multiply(Machine& machine, const Instruction& i) {
  constexpr int per_word = 4 / int(sizeof(T)), groups = depth / per_word / 4;
  constexpr int a_first = 4, b_first = a_first + 2 * groups, c_first = b_first + groups;
  Call call{&machine, &i};
  meet(
      kWholeWarp, i.line,
      [](void** arguments, uint32_t) {
        std::array<std::array<double, depth>, 16> a;
        std::array<std::array<double, depth>, 8> b;
        for (int k = 0; k < depth; ++k) {
          const int word = k / per_word, group = word / 4, lane = word % 4, which = k % per_word;
          for (int row = 0; row < 16; ++row) {
            const Call& owner = call_of(arguments, row % 8 * 4 + lane);
            a[row][k] = element<T>(owner.read<uint32_t>(a_first + row / 8 + 2 * group), which);
          }
          for (int column = 0; column < 8; ++column) {
            const Call& owner = call_of(arguments, column * 4 + lane);
            b[column][k] = element<T>(owner.read<uint32_t>(b_first + group), which);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          const Call& owner = call_of(arguments, lane);
          for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r / 2), column = lane % 4 * 2 + r % 2;
            double sum = owner.read<float>(c_first + r);
            for (int k = 0; k < depth; ++k) sum += a[row][k] * b[column][k];
            owner.machine->write<float>(owner.instruction->slots[r], float(sum));
          }
        }
      },
      &call);
}

// Matrices of 8 x 8 halves: lane 8 m + r brings the address of row r of matrix m.
struct Matrices {
  uint16_t row[8];    // at this lane's address
  uint32_t words[4];  // this lane's part of each matrix
};

Matrices& matrices_of(void** arguments, int lane) {
  return *static_cast<Matrices*>(arguments[lane]);
}

template <int matrices, bool transposed, class F>
void for_halves(F function) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < matrices; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int across = lane % 4 * 2 + half, along = lane / 4;
        function(lane, m, half, 8 * m + (transposed ? across : along), transposed ? along : across);
      }
    }
  }
}

template <int matrices, bool transposed>
void load_matrices(Machine& machine, const Instruction& i) {
  Matrices own{};
  if (thread->lane() < 8 * matrices) {
    const uint64_t from = address_in<Space::kShared>(machine, i, matrices);
    machine.memory->read(Space::kShared, from, own.row, sizeof own.row, i.line);
  }
  meet(
      kWholeWarp, i.line,
      [](void** arguments, uint32_t) {
        for_halves<matrices, transposed>([&](int lane, int m, int half, int owner, int column) {
          const uint32_t element = matrices_of(arguments, owner).row[column];
          matrices_of(arguments, lane).words[m] |= element << 16 * half;
        });
      },
      &own);
  for (int m = 0; m < matrices; ++m) machine.write<uint32_t>(i.slots[m], own.words[m]);
}

template <int matrices, bool transposed>
void store_matrices(Machine& machine, const Instruction& i) {
  Matrices own{};
  for (int m = 0; m < matrices; ++m) own.words[m] = machine.read<uint32_t>(i.slots[1 + m]);
  meet(
      kWholeWarp, i.line,
      [](void** arguments, uint32_t) {
        for_halves<matrices, transposed>([&](int lane, int m, int half, int owner, int column) {
          const uint32_t word = matrices_of(arguments, lane).words[m];
          matrices_of(arguments, owner).row[column] = uint16_t(word >> 16 * half);
        });
      },
      &own);
  if (thread->lane() < 8 * matrices) {
    const uint64_t to = address_in<Space::kShared>(machine, i, 0);
    machine.memory->write(Space::kShared, to, own.row, sizeof own.row, i.line);
  }
}

template <int matrices>
void define_matrices(Operations& all) {
  const std::string shape = "matrix.m8n8.x" + std::to_string(matrices);
  put(all, {"ld", shape, ".shared.b16"}, load_matrices<matrices, false>);
  put(all, {"ld", shape, ".trans.shared.b16"}, load_matrices<matrices, true>);
  put(all, {"st", shape, ".shared.b16"}, store_matrices<matrices, false>);
  put(all, {"st", shape, ".trans.shared.b16"}, store_matrices<matrices, true>);
}

template <class T>
void define_reductions(Operations& all, std::string_view type) {
  put(all, {"redux.add", type}, reduce_lanes<T>([](T a, T b) { return T(a + b); }));
  put(all, {"redux.min", type}, reduce_lanes<T>([](T a, T b) { return std::min(a, b); }));
  put(all, {"redux.max", type}, reduce_lanes<T>([](T a, T b) { return std::max(a, b); }));
  put(all, {"redux.and", type}, reduce_lanes<T>([](T a, T b) { return T(a & b); }));
  put(all, {"redux.or", type}, reduce_lanes<T>([](T a, T b) { return T(a | b); }));
  put(all, {"redux.xor", type}, reduce_lanes<T>([](T a, T b) { return T(a ^ b); }));
}

}  // namespace

void define_memory(Operations& all) {
  define_space<Space::kGlobal>(all, ".global");
  define_space<Space::kShared>(all, ".shared");
  define_space<Space::kPrivate>(all, ".private");
  define_space<Space::kGeneric>(all, "");
  all["cvta.shared.u64"] = [](Machine& machine, const Instruction& i) {
    const auto base = reinterpret_cast<uint64_t>(block->shared);
    machine.write<uint64_t>(i.slots[0], base + machine.read<uint32_t>(i.slots[1]));
  };
  all["cvta.to.shared.u64"] = [](Machine& machine, const Instruction& i) {
    const auto base = reinterpret_cast<uint64_t>(block->shared);
    machine.write<uint64_t>(i.slots[0], machine.read<uint64_t>(i.slots[1]) - base);
  };
  all["cp.async"] = copy_later;
  all["cp.async.commit_group"] = [](Machine& machine, const Instruction&) {
    machine.copies.emplace_back();
  };
  all["cp.async.wait_group"] = [](Machine& machine, const Instruction& i) {
    copy_groups(machine, machine.read<uint32_t>(i.slots[0]) + 1);
  };
  all["cp.async.wait_all"] = [](Machine& machine, const Instruction&) {
    copy_groups(machine, 0);
    machine.copies.emplace_back();
  };
}

void define_warp(Operations& all) {
  all["bar"] = pass_barrier;
  all["bar.red.popc.u32"] = vote_of_block([](int votes, int) { return votes; });
  all["bar.red.and.pred"] = vote_of_block([](int votes, int threads) { return votes == threads; });
  all["bar.red.or.pred"] = vote_of_block([](int votes, int) { return votes > 0; });
  all["bar.warp"] = pass_warp_barrier;
  all["shfl.up.b32"] = shuffle_lanes<'u'>;
  all["shfl.down.b32"] = shuffle_lanes<'d'>;
  all["shfl.bfly.b32"] = shuffle_lanes<'b'>;
  all["shfl.idx.b32"] = shuffle_lanes<'i'>;
  all["vote.ballot.b32"] = vote([](uint32_t votes, uint32_t) { return votes; });
  all["vote.all.pred"] = vote([](uint32_t votes, uint32_t mask) { return votes == mask; });
  all["vote.any.pred"] = vote([](uint32_t votes, uint32_t) { return votes != 0; });
  all["match.any.b32"] = match_lanes<uint32_t>;
  all["match.any.b64"] = match_lanes<uint64_t>;
  define_reductions<int32_t>(all, ".s32");
  define_reductions<uint32_t>(all, ".u32");
  define_reductions<uint32_t>(all, ".b32");
  define_matrices<1>(all);
  define_matrices<2>(all);
  define_matrices<4>(all);
  all["mma.m16n8k8.row.col.f32.f16.f16.f32"] = multiply<Half, 8>;
  all["mma.m16n8k16.row.col.f32.f16.f16.f32"] = multiply<Half, 16>;
  all["mma.m16n8k8.row.col.f32.bf16.bf16.f32"] = multiply<BFloat16, 8>;
  all["mma.m16n8k16.row.col.f32.bf16.bf16.f32"] = multiply<BFloat16, 16>;
  all["mma.m16n8k4.row.col.f32.tf32.tf32.f32"] = multiply<TensorFloat, 4>;
  all["mma.m16n8k8.row.col.f32.tf32.tf32.f32"] = multiply<TensorFloat, 8>;
}

}  // namespace gpu
