// Blobs whose bytes were compared with their checksum before.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mpqdm/blob.h"

namespace mpqdm {

// Reads a blob and checks its structure, in time linear in its rows. The checksum over all its bytes
// is taken the first time only: an address, a length and a checksum that were seen together are
// trusted from then on. May be called from several threads.
BlobError read_verified(const uint8_t* data, size_t size, Blob* blob);

}  // namespace mpqdm
