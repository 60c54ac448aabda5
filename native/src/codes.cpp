#include "mpqdm/codes.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "code_slots.h"
#include "code_tables.h"

namespace mpqdm {
namespace {

constexpr size_t kLaneCodes = 8192;     // a lane has at least
constexpr size_t kMostCodes = 1 << 15;  // that a byte can tell
constexpr size_t kRowBits = 6, kShiftBits = 4;
constexpr int kNoShift = 8;             // as it is stored
constexpr size_t kFewRows = 4;          // below which channels have no shifts

static_assert(sizeof kLargestKept == kCodeClasses);

// Gives the numbers of a class their slots: its codes from the least up, after the escape.
void fill_class(CodeSlots& slots, uint32_t code_class, const uint16_t (&frequencies)[256]) {
  uint32_t start = 0;
  for (uint32_t number = 0; number < 256; ++number) {
    const uint32_t frequency = frequencies[number];
    slots.frequencies[code_class][number] = static_cast<uint16_t>(frequency);
    slots.starts[code_class][number] = static_cast<uint16_t>(start);
    uint32_t* entries = slots.entries + code_class * kSlots + start;
    for (uint32_t place = 0; place < frequency; ++place) {
      entries[place] = (number ^ kEscape) | frequency << 8 | place << 20;
    }
    start += frequency;
  }
}

std::unique_ptr<const CodeSlots> make_slots() {
  auto slots = std::make_unique<CodeSlots>();
  const uint16_t* kept = kKeptFrequencies;
  for (uint32_t code_class = 0; code_class < kCodeClasses; ++code_class) {
    uint16_t frequencies[256] = {};
    uint32_t escape = kSlots;
    for (int code = 0; code <= kLargestKept[code_class]; ++code, ++kept) {
      frequencies[128 + code] = frequencies[128 - code] = *kept;
      escape -= code == 0 ? *kept : 2u * *kept;
    }
    frequencies[0] = static_cast<uint16_t>(escape);
    fill_class(*slots, code_class, frequencies);
  }
  uint16_t equal[256];
  std::fill(std::begin(equal), std::end(equal), static_cast<uint16_t>(kSlots / 256));
  fill_class(*slots, kRawClass, equal);
  return slots;
}

// Number `index` of numbers of `bits` bits, at most 8, in `bytes`; the first is the lowest.
uint32_t bits_at(const uint8_t* bytes, size_t bits, size_t index) {
  const size_t at = bits * index;
  uint32_t value = bytes[at / 8] >> (at % 8);
  if (at % 8 + bits > 8) value |= static_cast<uint32_t>(bytes[at / 8 + 1]) << (8 - at % 8);
  return value & ((1u << bits) - 1);
}

bool padding_is_zero(const uint8_t* bytes, size_t bits) {
  return bits % 8 == 0 || bytes[bits / 8] >> (bits % 8) == 0;
}

// What tells the classes, at the head of a stream.
struct Header {
  const uint8_t* rows;    // 6 bits each
  const uint8_t* shifts;  // 4 bits each: of channels if there are, then of places if there are
  bool has_channels, has_places;

  // `stream` has `bytes_of(shape)`.
  Header(const uint8_t* stream, const CodesShape& shape)
      : rows(stream),
        shifts(stream + row_bytes(shape)),
        has_channels(shape.rows >= kFewRows),
        has_places(shape.places > 1) {}

  static size_t bytes_of(const CodesShape& shape) {
    return row_bytes(shape) + (shift_count(shape) * kShiftBits + 7) / 8;
  }

  static size_t row_bytes(const CodesShape& shape) { return (shape.rows * kRowBits + 7) / 8; }

  static size_t shift_count(const CodesShape& shape) {
    return (shape.rows >= kFewRows ? shape.channels : 0) + (shape.places > 1 ? shape.places : 0);
  }

  bool padded(const CodesShape& shape) const {
    return padding_is_zero(rows, shape.rows * kRowBits) &&
           padding_is_zero(shifts, shift_count(shape) * kShiftBits);
  }

  // Shift of each column [channels][places].
  std::vector<int8_t> columns(const CodesShape& shape) const {
    std::vector<int8_t> columns(shape.channels * shape.places);
    const size_t places_at = has_channels ? shape.channels : 0;
    for (size_t i = 0; i < columns.size(); ++i) {
      const size_t channel = i / shape.places, place = i % shape.places;
      int shift = 0;
      if (has_channels) shift += static_cast<int>(bits_at(shifts, kShiftBits, channel)) - kNoShift;
      if (has_places) {
        shift += static_cast<int>(bits_at(shifts, kShiftBits, places_at + place)) - kNoShift;
      }
      columns[i] = static_cast<int8_t>(shift);
    }
    return columns;
  }
};

void write_classes(int row, const std::vector<int8_t>& columns, uint8_t* classes) {
  constexpr int kLast = static_cast<int>(kCodeClasses) - 1;
  for (size_t i = 0; i < columns.size(); ++i) {
    classes[i] = static_cast<uint8_t>(std::clamp(row + columns[i], 0, kLast));
  }
}

// Puts the bytes behind the codes into their places.
CodesError decode_escaped(const KernelSet& kernels, CodeStream& stream, size_t lanes,
                          uint8_t* codes, size_t count) {
  const auto escaped = static_cast<size_t>(std::count(codes, codes + count, kEscape));
  if (escaped == 0) return CodesError::none;
  std::vector<uint8_t> raw(escaped, static_cast<uint8_t>(kRawClass));
  if (!kernels.decode_run(stream, lanes, raw.data(), escaped)) return CodesError::early_end;
  if (std::find(raw.begin(), raw.end(), kEscape) != raw.end()) return CodesError::bad_code;
  const uint8_t* next = raw.data();
  for (size_t i = 0; i < count; ++i) {
    if (codes[i] == kEscape) codes[i] = *next++;
  }
  return CodesError::none;
}

CodesError decode_words(const KernelSet& kernels, const uint8_t* bytes, size_t size,
                        uint8_t* codes, size_t count) {
  const size_t lanes = code_lanes(count);
  if (size % 2 != 0 || size < 4 * lanes) return CodesError::cut_words;
  CodeStream stream{bytes + 4 * lanes, bytes + size, {}};
  std::memcpy(stream.states, bytes, 4 * lanes);
  if (!kernels.decode_run(stream, lanes, codes, count)) return CodesError::early_end;
  const CodesError error = decode_escaped(kernels, stream, lanes, codes, count);
  if (error != CodesError::none) return error;
  const bool at_start = std::all_of(stream.states, stream.states + lanes,
                                    [](uint32_t state) { return state == kLeastState; });
  return at_start && stream.words == stream.end ? CodesError::none : CodesError::bad_end;
}

// Whether the codes are 1 to 2^44, and few enough for `size_t`, so that nothing computed from it
// overflows.
bool is_sensible(const CodesShape& shape) {
  constexpr uint64_t kMost = std::min(uint64_t{1} << 44, uint64_t{SIZE_MAX} >> kRowBits);
  if (shape.rows == 0 || shape.channels == 0 || shape.places == 0) return false;
  return shape.rows <= kMost && shape.channels <= kMost / shape.rows &&
         shape.places <= kMost / (shape.rows * shape.channels);
}

}  // namespace

size_t code_lanes(size_t count) {
  size_t lanes = 1;
  while (lanes < kMostLanes && 2 * lanes * kLaneCodes <= count) lanes *= 2;
  return lanes;
}

const CodeSlots& code_slots() {
  static const std::unique_ptr<const CodeSlots> slots = make_slots();
  return *slots;
}

const char* describe(CodesError error) {
  switch (error) {
    case CodesError::none: return "nothing is wrong";
    case CodesError::bad_sizes: return "the layer has no codes, or more codes than such a stream can tell";
    case CodesError::cut_classes: return "the stream ends within its classes";
    case CodesError::bad_class: return "a row has a class that there is not";
    case CodesError::cut_words: return "the words are cut";
    case CodesError::early_end: return "the stream ends before the last code";
    case CodesError::bad_end: return "the stream does not end where it is to";
    case CodesError::bad_code: return "a code is -128";
    case CodesError::no_memory: return "no memory is left for the codes";
  }
  return "unknown";
}

CodesError decode_codes(const KernelSet& kernels, const uint8_t* stream, size_t size,
                        const CodesShape& shape, int8_t* codes) {
  if (!is_sensible(shape)) return CodesError::bad_sizes;
  const size_t columns = shape.channels * shape.places, count = shape.rows * columns;
  if ((count - 1) / kMostCodes >= size) return CodesError::bad_sizes;
  const size_t head = Header::bytes_of(shape);
  if (size < head) return CodesError::cut_classes;
  const Header header(stream, shape);
  if (!header.padded(shape)) return CodesError::bad_class;
  const std::vector<int8_t> shifts = header.columns(shape);
  auto* bytes = reinterpret_cast<uint8_t*>(codes);
  for (size_t row = 0; row < shape.rows; ++row) {
    const uint32_t of_row = bits_at(header.rows, kRowBits, row);
    if (of_row >= kCodeClasses) return CodesError::bad_class;
    write_classes(static_cast<int>(of_row), shifts, bytes + row * columns);
  }
  return decode_words(kernels, stream + head, size - head, bytes, count);
}

}  // namespace mpqdm
