// Bit planes of FORMAT.md: where the bits of a code lie. Shared by the unpackers.
#pragma once

#include "mpqdm/blob.h"

namespace mpqdm {

constexpr int kTileGroups = kTileDepth / kGroupDepth;
constexpr int kVectorBytes = kGroupBytes;  // a plane's vectors have a byte for each code of a group

// What the code 0 stands for, and the distance of neighbouring codes, in encodings without a table.
struct Ladder {
  int first, step;
};

constexpr Ladder ladder(Encoding encoding, int bits) {
  return encoding == Encoding::odd ? Ladder{-((1 << bits) - 1), 2} : Ladder{-(1 << (bits - 1)), 1};
}

}  // namespace mpqdm
