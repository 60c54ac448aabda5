#include <algorithm>
#include <cstring>

#include "code_slots.h"

namespace mpqdm {
namespace {

uint32_t read_word(const uint8_t* at) {
  uint16_t word = 0;
  std::memcpy(&word, at, sizeof word);
  return word;
}

// The number of a state, and the state behind it before words are read.
uint8_t pop_code(const uint32_t* entries, uint32_t code_class, uint32_t& state) {
  const uint32_t entry = entries[(code_class << kSlotBits) + (state & (kSlots - 1))];
  state = ((entry >> 8) & (kSlots - 1)) * (state >> kSlotBits) + (entry >> 20);
  return static_cast<uint8_t>(entry);
}

// One code after the other, as far as the words go.
bool decode_slowly(CodeStream& stream, size_t lanes, uint8_t* codes, size_t count) {
  const uint32_t* entries = code_slots().entries;
  for (size_t i = 0; i < count; ++i) {
    uint32_t& state = stream.states[i % lanes];
    codes[i] = pop_code(entries, codes[i], state);
    if (state >= kLeastState) continue;
    if (stream.words == stream.end) return false;
    state = state << 16 | read_word(stream.words);
    stream.words += 2;
  }
  return true;
}

template <size_t kLanes>
bool decode_lanes(CodeStream& stream, uint8_t* codes, size_t count) {
  const uint32_t* entries = code_slots().entries;
  const uint8_t* words = stream.words;
  uint32_t states[kLanes];
  std::copy_n(stream.states, kLanes, states);
  // A round reads a word a lane at most.
  while (count >= kLanes && stream.end - words >= static_cast<ptrdiff_t>(2 * kLanes)) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      uint32_t state = states[lane];
      codes[lane] = pop_code(entries, codes[lane], state);
      // Whether a word is taken is random: no branch would foresee it.
      const uint32_t taken = state < kLeastState ? 1 : 0;
      states[lane] = state << 16 * taken | (read_word(words) & (0 - taken));
      words += 2 * taken;
    }
    codes += kLanes;
    count -= kLanes;
  }
  stream.words = words;
  std::copy_n(states, kLanes, stream.states);
  return decode_slowly(stream, kLanes, codes, count);
}

}  // namespace

bool decode_run_scalar(CodeStream& stream, size_t lanes, uint8_t* codes, size_t count) {
  switch (lanes) {
    case 1: return decode_lanes<1>(stream, codes, count);
    case 2: return decode_lanes<2>(stream, codes, count);
    case 4: return decode_lanes<4>(stream, codes, count);
    case 8: return decode_lanes<8>(stream, codes, count);
    case 16: return decode_lanes<16>(stream, codes, count);
    default: return decode_lanes<32>(stream, codes, count);
  }
}

}  // namespace mpqdm
