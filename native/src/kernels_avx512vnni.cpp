// int8 dot products in 32 registers of 512 bits: a pair of blocks, 16 rows, in each.
#include "code_slots.h"
#include "elementwise.h"
#include "few_vnni.h"
#include "store.h"
#include "unpack_avx2.h"

namespace mpqdm {
namespace {

constexpr int kPixels = 8;
static_assert(kPixels <= kMaxPixels);

#define MPQDM_UNROLL _Pragma("GCC unroll 16")

__m512i join(__m256i low, __m256i high) {
  return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
}

__m256i load_group(const int8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

__m512i broadcast(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

// A core loads two vectors while it multiplies two. Inputs that are loaded for two pairs of blocks leave
// it time to load the weights.
template <int kPairs>
MPQDM_INLINE void multiply_pairs(const Inputs& inputs, const int8_t* const* blocks, int32_t* out) {
  __m512i sums[kPairs][kPixels];
  for (int pair = 0; pair < kPairs; ++pair) {
    MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) sums[pair][p] = _mm512_setzero_si512();
  }
  const auto depth = static_cast<size_t>(kGroupDepth * inputs.groups);
  size_t from = 0;
  for (int segment = 0; segment < inputs.segments; ++segment) {
    const uint8_t* x[kPixels];
    for (int p = 0; p < kPixels; ++p) {
      x[p] = inputs.pixels[p] + static_cast<size_t>(segment) * inputs.segment_stride;
    }
    for (size_t at = 0; at < depth; at += kGroupDepth, from += kGroupBytes) {
      __m512i weights[kPairs];
      MPQDM_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
        weights[pair] = join(load_group(blocks[2 * pair] + from), load_group(blocks[2 * pair + 1] + from));
      }
      MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
        const __m512i values = broadcast(x[p] + at);
        MPQDM_UNROLL for (int pair = 0; pair < kPairs; ++pair) {
          sums[pair][p] = _mm512_dpbusd_epi32(sums[pair][p], values, weights[pair]);
        }
      }
    }
  }
  for (int pair = 0; pair < kPairs; ++pair) {
    MPQDM_UNROLL for (int p = 0; p < kPixels; ++p) {
      _mm512_storeu_si512(out + kPairRows * (kPixels * pair + p), sums[pair][p]);
    }
  }
}

void multiply_avx512(const Inputs& inputs, const int8_t* first, const int8_t* second, int,
                     int32_t* out) {
  // One block alone is multiplied twice: as many instructions, and its second result is not read.
  const int8_t* const blocks[] = {first, second == nullptr ? first : second};
  multiply_pairs<1>(inputs, blocks, out);
}

void multiply_two_avx512(const Inputs& inputs, const int8_t* const* blocks, int32_t* out) {
  multiply_pairs<2>(inputs, blocks, out);
}

// Two blocks of one encoding and width in a vector; one block alone is there twice. What is fetched
// for later is the next pair, in one run, as memory and its caches give it fastest.
class TwoPlaces {
 public:
  explicit TwoPlaces(const Block* const (&blocks)[2])
      : first_(blocks[0]->codes),
        second_(blocks[1]->codes),
        ahead_(2 * static_cast<size_t>(second_ > first_ ? second_ - first_ : 0)) {}

  const uint8_t* first() const { return first_; }
  const uint8_t* second() const { return second_; }

  MPQDM_INLINE void step(size_t bytes) {
    fetch_ahead(first_, ahead_, 2 * bytes);
    ahead_ += bytes;
    first_ += bytes;
    second_ += bytes;
  }

 private:
  const uint8_t *first_, *second_;
  size_t ahead_;  // of `first_`
};

template <int kBits>
class TwoLookups {
 public:
  explicit TwoLookups(const Block* const (&blocks)[2]) {
    const Tables<kBits> low(blocks[0]->tables), high(blocks[1]->tables);
    for (int i = 0; i < kVectors; ++i) vectors_[i] = join(low.vectors[i], high.vectors[i]);
    row_start_ = join(low.row_start, high.row_start);
  }

  MPQDM_INLINE __m512i look_up(__m512i codes) const {
    const __m512i index = _mm512_add_epi8(codes, row_start_);
    __m512i result = _mm512_shuffle_epi8(vectors_[0], index);
    MPQDM_UNROLL for (int i = 1; i < kVectors; ++i) {
      // Bytes of the rows that have their tables in this vector.
      const uint64_t rows = kVectors == 2 ? 0xff00ff00ff00ff00u : 0x000f000f000f000fu << (4 * i);
      result = _mm512_mask_shuffle_epi8(result, rows, vectors_[i], index);
    }
    return result;
  }

 private:
  static constexpr int kVectors = Tables<kBits>::kVectors;
  __m512i vectors_[kVectors], row_start_;
};

struct Dot512 {
  static MPQDM_INLINE __m512i add(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
  }
  static MPQDM_INLINE __m512i add_bytes(__m512i x, __m512i y) { return _mm512_add_epi8(x, y); }
};

struct TwoBlocks {
  static constexpr int kBlocks = 2;
  static constexpr bool kGainsWithoutLeast = false;
  static constexpr int kMostPixels = 8;
  static constexpr int kLeastPixels = 1;
  static constexpr int kSums = 8;  // at least
  using Vector = __m512i;
  using Place = TwoPlaces;
  template <int kBits>
  using Planes = MaskedPlanes<TwoBlocks, kBits>;
  template <int kBits>
  using Lookup = TwoLookups<kBits>;
  template <class Codes, int kCount>
  using Products = DotProducts<TwoBlocks, Dot512, Codes, kCount>;

  static MPQDM_INLINE Vector load(const Place& place, size_t at) {
    return join(load_vector(place.first() + at), load_vector(place.second() + at));
  }
  static MPQDM_INLINE Vector bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static MPQDM_INLINE Vector numbers(int value) { return _mm512_set1_epi32(value); }
  template <int shift>
  static MPQDM_INLINE Vector shifted(Vector x) {
    if constexpr (shift >= 0) {
      return _mm512_slli_epi16(x, static_cast<unsigned>(shift));
    } else {
      return _mm512_srli_epi16(x, static_cast<unsigned>(-shift));
    }
  }
  static MPQDM_INLINE Vector repeat(const uint8_t* four) {
    return _mm512_castps_si512(_mm512_broadcastss_ps(load_four(four)));
  }
  static MPQDM_INLINE Vector both(Vector x, Vector mask) { return _mm512_and_si512(x, mask); }
  static MPQDM_INLINE Vector add_bits(Vector x, Vector bits, Vector mask) {
    return _mm512_ternarylogic_epi32(x, bits, mask, 0xf8);  // x | (bits & mask)
  }
  static MPQDM_INLINE Vector add(Vector x, Vector y) { return _mm512_add_epi32(x, y); }
  static MPQDM_INLINE Vector times(Vector x, Vector y) { return _mm512_mullo_epi32(x, y); }
  static MPQDM_INLINE void store(int32_t* sums, Vector x) { _mm512_storeu_si512(sums, x); }
};

void multiply_few_avx512(const FewInputs& inputs, const Block& first, const Block* second,
                         int32_t* sums) {
  if (second == nullptr) return multiply_few<TwoBlocks>(inputs, {&first, &first}, sums);
  if (first.encoding == second->encoding && first.bits == second->bits) {
    return multiply_few<TwoBlocks>(inputs, {&first, second}, sums);
  }
  int32_t others[kMostFew * kPairRows];
  multiply_few<TwoBlocks>(inputs, {&first, &first}, sums);
  multiply_few<TwoBlocks>(inputs, {second, second}, others);
  for (int p = 0; p < inputs.pixels; ++p) {
    const int at = kPairRows * p + kBlockRows;
    std::memcpy(sums + at, others + at, kBlockRows * sizeof(int32_t));
  }
}

}  // namespace

const KernelSet kAvx512VnniKernels = {
    "avx512vnni", true, kPixels, unpack_avx2, sum_avx2, multiply_avx512, store_rows,
    extend_range, quantize_run, dequantize_run, add_moments, normalize, decode_run_avx2,
    {16, 1, copy_inputs, multiply_few_avx512}, multiply_two_avx512};

}  // namespace mpqdm
