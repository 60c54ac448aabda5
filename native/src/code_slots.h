// The tables of the entropy code, and the states of a decoder (FORMAT.md, "Codes").
#pragma once

#include <cstddef>
#include <cstdint>

namespace mpqdm {

constexpr uint32_t kCodeClasses = 40;
constexpr uint32_t kRawClass = kCodeClasses;  // of the bytes behind the codes
constexpr int kSlotBits = 12;
constexpr uint32_t kSlots = 1u << kSlotBits;
constexpr uint32_t kLeastState = 1u << 16;
constexpr size_t kMostLanes = 32;
constexpr uint8_t kEscape = 0x80;  // -128

// States that so many codes take turns with.
size_t code_lanes(size_t count);

// Where numbers have their slots.
struct CodeSlots {
  // By class and slot: the number as a byte, 12 bits of its frequency, 12 bits of the slot's place
  // among those of its number.
  uint32_t entries[(kCodeClasses + 1) * kSlots];
  // By class and number + 128.
  uint16_t frequencies[kCodeClasses + 1][256];
  uint16_t starts[kCodeClasses + 1][256];
};

const CodeSlots& code_slots();

// What a decoder has not read yet.
struct CodeStream {
  const uint8_t* words;
  const uint8_t* end;  // an even number of bytes behind `words`
  uint32_t states[kMostLanes];
};

// Decodes `count` codes with `lanes` states that take turns. `codes` holds their classes, all known
// ones, and gets the codes. False if the words run out.
bool decode_run_scalar(CodeStream& stream, size_t lanes, uint8_t* codes, size_t count);
bool decode_run_avx2(CodeStream& stream, size_t lanes, uint8_t* codes, size_t count);

}  // namespace mpqdm
