// CRC-32 with the polynomial of zlib, as the manifests of packs hold it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashrt::io {

// The checksum of `bytes` bytes: what zlib's crc32(0, data, bytes) gives, with the fastest way this processor has.
uint32_t crc32(const uint8_t* data, size_t bytes);

// The same from tables, on any processor.
uint32_t crc32_portable(const uint8_t* data, size_t bytes);

}  // namespace flashrt::io
