#include <algorithm>
#include <cstring>
#include <vector>

#include "code_slots.h"
#include "mpqdm/codes.h"

namespace mpqdm {
namespace {

// Encodes from the last code to the first, and so writes from the end.
struct Encoder {
  const CodeSlots& slots;
  size_t lanes;
  uint8_t* words;
  uint32_t states[kMostLanes];

  void push(size_t index, uint32_t code_class, uint32_t number) {
    uint32_t& state = states[index % lanes];
    const uint32_t frequency = slots.frequencies[code_class][number];
    if (state >> 20 >= frequency) {
      const auto word = static_cast<uint16_t>(state);
      words -= sizeof word;
      std::memcpy(words, &word, sizeof word);
      state >>= 16;
    }
    state = (state / frequency << kSlotBits) + state % frequency +
            slots.starts[code_class][number];
  }
};

}  // namespace

size_t encoded_limit(size_t count) { return 4 * kMostLanes + 4 * count; }

size_t encode_codes(const int8_t* codes, const uint8_t* classes, size_t count, uint8_t* stream) {
  const CodeSlots& slots = code_slots();
  std::vector<uint32_t> escaped;
  for (size_t i = 0; i < count; ++i) {
    if (classes[i] >= kCodeClasses || codes[i] == -128) return 0;
    const auto number = static_cast<uint32_t>(codes[i] + 128);
    if (slots.frequencies[classes[i]][number] == 0) escaped.push_back(number);
  }
  uint8_t* end = stream + encoded_limit(count);
  Encoder encoder{slots, code_lanes(count), end, {}};
  std::fill_n(encoder.states, kMostLanes, kLeastState);
  for (size_t i = escaped.size(); i-- > 0;) encoder.push(i, kRawClass, escaped[i]);
  for (size_t i = count; i-- > 0;) {
    const auto number = static_cast<uint32_t>(codes[i] + 128);
    const bool is_kept = slots.frequencies[classes[i]][number] != 0;
    encoder.push(i, classes[i], is_kept ? number : 0);
  }
  const size_t head = 4 * encoder.lanes;
  const auto words = static_cast<size_t>(end - encoder.words);
  std::memmove(stream + head, encoder.words, words);
  std::memcpy(stream, encoder.states, head);
  return head + words;
}

}  // namespace mpqdm
