#include "verified_blobs.h"

#include <array>
#include <mutex>

namespace mpqdm {
namespace {

// What one comparison of a checksum was about.
struct Verified {
  const uint8_t* data = nullptr;
  uint64_t bytes = 0, checksum = 0;

  bool operator==(const Verified& other) const {
    return data == other.data && bytes == other.bytes && checksum == other.checksum;
  }
};

// A hash table of fixed size. A blob that finds no place near its own evicts another one, which is
// then summed up again: bounded memory, never a wrong answer.
class VerifiedBlobs {
 public:
  bool has(const Verified& blob) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return find(blob, blob) != kPlaces;
  }

  void add(const Verified& blob) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t empty = find(blob, Verified{});
    places_[empty == kPlaces ? home(blob) : empty] = blob;
  }

 private:
  static constexpr size_t kPlaces = 4096;  // layers of programs in one process
  static constexpr size_t kNear = 8;       // places that are searched

  static size_t home(const Verified& blob) {
    const uint64_t mixed = (reinterpret_cast<uintptr_t>(blob.data) ^ blob.checksum) *
                           uint64_t{0x9e3779b97f4a7c15};
    return static_cast<size_t>(mixed >> 52) % kPlaces;
  }

  // Place of `wanted` among those near the home of `blob`, or kPlaces.
  size_t find(const Verified& blob, const Verified& wanted) const {
    for (size_t step = 0; step < kNear; ++step) {
      const size_t place = (home(blob) + step) % kPlaces;
      if (places_[place] == wanted) return place;
    }
    return kPlaces;
  }

  std::mutex mutex_;
  std::array<Verified, kPlaces> places_;
};

VerifiedBlobs& verified_blobs() {
  static VerifiedBlobs blobs;
  return blobs;
}

}  // namespace

BlobError read_verified(const uint8_t* data, size_t size, Blob* blob) {
  const BlobError structure = Blob::read(data, size, blob);
  if (structure != BlobError::none) return structure;
  const Verified key{data, blob->bytes(), blob->checksum()};
  if (verified_blobs().has(key)) return BlobError::none;
  const BlobError bytes = blob->verify_checksum();
  if (bytes == BlobError::none) verified_blobs().add(key);
  return bytes;
}

}  // namespace mpqdm
