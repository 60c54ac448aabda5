// Eight states a vector.
#include <immintrin.h>

#include <bit>
#include <cstring>

#include "code_slots.h"

namespace mpqdm {
namespace {

// For each set of states that take words: which word each of them takes.
struct WordOrder {
  alignas(32) uint32_t of[256][8] = {};

  constexpr WordOrder() {
    for (uint32_t taking = 0; taking < 256; ++taking) {
      uint32_t next = 0;
      for (uint32_t lane = 0; lane < 8; ++lane) {
        of[taking][lane] = next;
        next += taking >> lane & 1;
      }
    }
  }
};

constexpr WordOrder kOrder;

__m256i vector_at(const uint32_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// Eight codes of eight states; `words` has 16 bytes.
__m256i pop_eight(const int* entries, __m256i states, uint8_t* codes, const uint8_t*& words) {
  const __m128i classes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m256i slots = _mm256_and_si256(states, _mm256_set1_epi32(kSlots - 1));
  const __m256i tables = _mm256_slli_epi32(_mm256_cvtepu8_epi32(classes), kSlotBits);
  const __m256i entry = _mm256_i32gather_epi32(entries, _mm256_or_si256(tables, slots), 4);
  const __m256i low_bytes = _mm256_shuffle_epi8(entry, _mm256_set1_epi32(0x0c080400));
  const uint32_t first = static_cast<uint32_t>(_mm256_extract_epi32(low_bytes, 0));
  const uint32_t second = static_cast<uint32_t>(_mm256_extract_epi32(low_bytes, 4));
  std::memcpy(codes, &first, 4);
  std::memcpy(codes + 4, &second, 4);

  const __m256i frequency =
      _mm256_and_si256(_mm256_srli_epi32(entry, 8), _mm256_set1_epi32(kSlots - 1));
  states = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(states, kSlotBits)),
                            _mm256_srli_epi32(entry, 20));

  const __m256i is_low =
      _mm256_cmpeq_epi32(_mm256_srli_epi32(states, 16), _mm256_setzero_si256());
  const auto taking = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_low)));
  const __m256i next =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  const __m256i taken = _mm256_permutevar8x32_epi32(next, vector_at(kOrder.of[taking]));
  const __m256i filled = _mm256_or_si256(_mm256_slli_epi32(states, 16), taken);
  words += 2 * std::popcount(taking);
  return _mm256_blendv_epi8(states, filled, is_low);
}

template <size_t kVectors>
bool decode_vectors(CodeStream& stream, uint8_t* codes, size_t count) {
  constexpr size_t kLanes = 8 * kVectors;
  const auto* entries = reinterpret_cast<const int*>(code_slots().entries);
  const uint8_t* words = stream.words;
  __m256i states[kVectors];
  for (size_t v = 0; v < kVectors; ++v) states[v] = vector_at(stream.states + 8 * v);
  // A round reads a word a lane at most.
  while (count >= kLanes && stream.end - words >= static_cast<ptrdiff_t>(2 * kLanes)) {
    for (size_t v = 0; v < kVectors; ++v) {
      states[v] = pop_eight(entries, states[v], codes + 8 * v, words);
    }
    codes += kLanes;
    count -= kLanes;
  }
  stream.words = words;
  for (size_t v = 0; v < kVectors; ++v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(stream.states + 8 * v), states[v]);
  }
  return decode_run_scalar(stream, kLanes, codes, count);
}

}  // namespace

bool decode_run_avx2(CodeStream& stream, size_t lanes, uint8_t* codes, size_t count) {
  switch (lanes) {
    case 16: return decode_vectors<2>(stream, codes, count);
    case 32: return decode_vectors<4>(stream, codes, count);
    // a single vector would wait for itself
    default: return decode_run_scalar(stream, lanes, codes, count);
  }
}

}  // namespace mpqdm
