// head_average, attention_map and attention_with_map for CPU tensors: a thread takes a range of
// examples, or of their blocks of words.
#include "syncmask/attention.h"
#include "syncmask/heads.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace syncmask::cpu {

// One example, or a head of one; compiled for each instruction set.
#define SYNCMASK_AVERAGE(T)                                                                       \
  SYNCMASK_CLONES void average(const Planes<T>& planes, const int64_t* words, int64_t count,      \
                               int64_t patches, float* means) {                                   \
    sum_planes(planes, words, count, patches, means);                                             \
    const float divisor = static_cast<float>(planes.count);                                       \
    for (int64_t i = 0; i < count * patches; ++i) means[i] /= divisor;                            \
  }

#define SYNCMASK_ADD_HEAD(T)                                                                      \
  SYNCMASK_CLONES void add_head(const HeadRows<T>& q, const HeadRows<T>& k, const HeadRows<T>* v, \
                                const bool* key_valid, float scale, int64_t width,                \
                                const AttentionRoom& room, float* means, T* output) {             \
    head_logits(q, k, key_valid, scale, width, room);                                             \
    exponentials(room.logits, k.rows, width, room.factors);                                       \
    add_probabilities(room.logits, room.factors, k.rows, width, means);                           \
    if (v) weigh_values(*v, q.rows, width, room, output);                                         \
  }

#define SYNCMASK_OUTPUT(T)                                                                        \
  SYNCMASK_AVERAGE(T)                                                                             \
  SYNCMASK_ADD_HEAD(T)
SYNCMASK_OUTPUT(float)
SYNCMASK_OUTPUT(Half)
SYNCMASK_OUTPUT(BFloat16)
#undef SYNCMASK_OUTPUT
#undef SYNCMASK_ADD_HEAD
#undef SYNCMASK_AVERAGE

SYNCMASK_CLONES void write_map(const float* means, int64_t width, int64_t words, int64_t patches,
                               const float* factors, float* map) {
  unpack(means, width, words, patches, factors, map, patches);
}

template <typename T>
void average_heads(const Tensor& attn, int64_t skip_keys, Tensor& means) {
  const int64_t layers = attn.size(0), heads = attn.size(2), tokens = attn.size(3);
  const int64_t patches = attn.size(4) - skip_keys;
  const T* first = static_cast<const T*>(attn.const_data_ptr()) + skip_keys * attn.stride(4);
  const int64_t chunk = words_at_once(patches), chunks = (tokens + chunk - 1) / chunk;
  std::vector<int64_t> words(tokens);
  std::iota(words.begin(), words.end(), 0);
  torch::stable::parallel_for(0, attn.size(1) * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<const T*> planes(layers * heads);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks, t = i % chunks * chunk;
      for (int64_t plane = 0; plane < layers * heads; ++plane) {
        planes[plane] = first + plane / heads * attn.stride(0) + b * attn.stride(1) +
                        plane % heads * attn.stride(2);
      }
      average(Planes<T>{planes.data(), layers * heads, attn.stride(3)}, words.data() + t,
              std::min(chunk, tokens - t), patches, data<float>(means) + (b * tokens + t) * patches);
    }
  });
}

// v and output are null for the map alone; output is [B, H, T, E].
template <typename T>
void attend(const Tensor& q, const Tensor& k, const Tensor* v, const MaybeTensor& key_valid,
            float scale, int64_t skip_keys, Tensor& map, Tensor* output) {
  const int64_t layers = q.size(0), batch = q.size(1), heads = q.size(2), tokens = q.size(3);
  const int64_t keys = k.size(3), dim = q.size(4), out_dim = v ? v->size(4) : 0;
  const int64_t patches = keys - skip_keys, blocks = (tokens + kWords - 1) / kWords;
  const Rows<bool> valid(key_valid, keys);
  torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t widest = padded(std::min(tokens, kWords));
    std::vector<float> queries(dim * widest), logits(keys * widest), means(keys * widest);
    std::vector<float> rows(keys * std::max(dim, padded(out_dim))), out(widest * padded(out_dim));
    std::vector<float> factors(widest), share(widest, 1.0f / static_cast<float>(layers * heads));
    const AttentionRoom room{queries.data(), rows.data(), logits.data(), out.data(),
                             factors.data()};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, t = i % blocks * kWords;
      const int64_t words = std::min(tokens - t, kWords), width = padded(words);
      std::fill(means.begin(), means.end(), 0.0f);
      for (int64_t plane = 0; plane < layers * heads; ++plane) {
        const int64_t l = plane / heads, h = plane % heads;
        HeadRows<T> queries_of = head_rows<T>(q, l, b, h);
        queries_of.data += t * queries_of.row;
        queries_of.rows = words;
        const HeadRows<T> keys_of = head_rows<T>(k, l, b, h);
        HeadRows<T> values_of{};
        T* written = nullptr;
        if (v) {
          values_of = head_rows<T>(*v, l, b, h);
          written = data<T>(*output) + ((b * heads + h) * tokens + t) * out_dim;
        }
        add_head(queries_of, keys_of, v ? &values_of : nullptr, valid.row(b), scale, width, room,
                 means.data(), written);
      }
      write_map(means.data() + skip_keys * width, width, words, patches, share.data(),
                data<float>(map) + (b * tokens + t) * patches);
    }
  });
}

}  // namespace syncmask::cpu

namespace {

using namespace syncmask;
using namespace syncmask::cpu;

Tensor head_average(Tensor attn, int64_t skip_keys) {
  if (attn.stride(4) != 1) attn = torch::stable::contiguous(attn);
  const int64_t patches = attn.size(4) - skip_keys;
  Tensor means = empty_output(attn, {attn.size(1), attn.size(3), patches}, ScalarType::Float);
  by_type(attn, [&](auto* type) {
    average_heads<std::remove_pointer_t<decltype(type)>>(attn, skip_keys, means);
  });
  return means;
}

Tensor attention_map(Tensor q, Tensor k, MaybeTensor key_valid, double scale, int64_t skip_keys) {
  Tensor map = empty_output(q, {q.size(1), q.size(3), k.size(3) - skip_keys}, ScalarType::Float);
  by_type(q, [&](auto* type) {
    attend<std::remove_pointer_t<decltype(type)>>(
        q, k, nullptr, key_valid, static_cast<float>(scale), skip_keys, map, nullptr);
  });
  return map;
}

std::tuple<Tensor, Tensor> attention_with_map(Tensor q, Tensor k, Tensor v, MaybeTensor key_valid,
                                              double scale, int64_t skip_keys) {
  Tensor map = empty_output(q, {q.size(0), q.size(2), k.size(2) - skip_keys}, ScalarType::Float);
  Tensor output = empty_output(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
  q = torch::stable::unsqueeze(q, 0);
  k = torch::stable::unsqueeze(k, 0);
  v = torch::stable::unsqueeze(v, 0);
  by_type(q, [&](auto* type) {
    attend<std::remove_pointer_t<decltype(type)>>(
        q, k, &v, key_valid, static_cast<float>(scale), skip_keys, map, &output);
  });
  return {output, map};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(syncmask, CPU, library) {
  library.impl("head_average.cpu", TORCH_BOX(&head_average));
  library.impl("attention_map.cpu", TORCH_BOX(&attention_map));
  library.impl("attention_with_map.cpu", TORCH_BOX(&attention_with_map));
}
