// Counter-based random numbers, and Gumbel noise made of them; see backends/eager/philox.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "syncmask/vector.h"

namespace syncmask {

struct PhiloxKey {
  uint32_t first, second;
};

// The four words of a counter, which become its random words.
struct Philox {
  uint32_t words[4];

  SYNCMASK_INLINE void round(const PhiloxKey& key) {
    constexpr uint32_t kFactors[2] = {0xD2511F53u, 0xCD9E8D57u};
    const uint32_t high[2] = {high_product(kFactors[0], words[0]),
                              high_product(kFactors[1], words[2])};
    const uint32_t low[2] = {kFactors[0] * words[0], kFactors[1] * words[2]};
    words[0] = high[1] ^ words[1] ^ key.first;
    words[1] = low[1];
    words[2] = high[0] ^ words[3] ^ key.second;
    words[3] = low[0];
  }

  static SYNCMASK_INLINE uint32_t high_product(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(uint64_t{a} * b >> 32);
  }
};

constexpr int kCounters = 16;
constexpr int kRandomWords = 4 * kCounters;

// The words of kCounters counters (block, row, 0, 0), counter after counter.
SYNCMASK_INLINE void philox_words(const PhiloxKey& key, uint32_t block, uint32_t row,
                                  uint32_t* words) {
  constexpr int kHalf = kCounters / 2;
  uint32_t columns[4][kCounters];
  for (int i = 0; i < kHalf; ++i) {
    // The steps of one counter wait for each other, so there are two.
    Philox left{{block + i, row, 0, 0}}, right{{block + kHalf + i, row, 0, 0}};
    PhiloxKey round_key = key;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      left.round(round_key);
      right.round(round_key);
      round_key.first += 0x9E3779B9u;
      round_key.second += 0xBB67AE85u;
    }
    for (int word = 0; word < 4; ++word) {
      columns[word][i] = left.words[word];
      columns[word][kHalf + i] = right.words[word];
    }
  }
  for (int i = 0; i < kCounters; ++i) {
    for (int word = 0; word < 4; ++word) words[4 * i + word] = columns[word][i];
  }
}

// The natural logarithm of normal positive numbers, within 2 units of the last place.
SYNCMASK_INLINE void logarithm(const Floats& x, Floats& result) {
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // of sqrt(1/2): the rest is around 1
  bits -= exponent << 23;
  Floats rest;
  std::memcpy(&rest, &bits, sizeof rest);
  rest -= 1.0f;
  const Floats whole = __builtin_convertvector(exponent, Floats);
  const Floats square = rest * rest, fourth = square * square;
  // In pairs, which wait less for each other than one long chain.
  const Floats low = (rest * -2.4999993993e-1f + 3.3333331174e-1f) +
                     (rest * -1.6668057665e-1f + 2.0000714765e-1f) * square;
  const Floats high = (rest * -1.2420140846e-1f + 1.4249322787e-1f) +
                      (rest * -1.1514610310e-1f + 1.1676998740e-1f) * square;
  Floats power = low + fourth * (high + fourth * 7.0376836292e-2f);
  power = power * rest * square - whole * 2.12194440e-4f - 0.5f * square;
  result = rest + power + whole * 0.693359375f;
}

// Standard Gumbel noise -log(-log(u)), u = (word / 2^9 + 1/2) / 2^23 with whole quotients.
SYNCMASK_INLINE void gumbel(const uint32_t* words, Floats& noise) {
  Ints word;
  std::memcpy(&word, words, sizeof word);
  word = (word >> 9) & 0x7fffff;
  noise = (__builtin_convertvector(word, Floats) + 0.5f) * 0x1p-23f;
  logarithm(noise, noise);
  logarithm(-noise, noise);
  noise = -noise;
}

}  // namespace syncmask
