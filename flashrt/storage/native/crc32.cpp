#include "crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

namespace flashrt::io {
namespace {

constexpr uint32_t POLYNOMIAL = 0xEDB88320;  // bit-reversed

using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
        tables[0][byte] = crc;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t byte = 0; byte < 256; ++byte)
            tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFF];
    return tables;
}

constexpr Tables TABLES = make_tables();

uint32_t byte_by_byte(uint32_t crc, const uint8_t* data, size_t bytes) {
    for (; bytes > 0; --bytes) crc = (crc >> 8) ^ TABLES[0][(crc ^ *data++) & 0xFF];
    return crc;
}

// Eight bytes at a time ("slicing by 8"). The bytes are put together by hand, so that byte order does not matter.
uint32_t from_tables(uint32_t crc, const uint8_t* p, size_t bytes) {
    for (; bytes >= 8; bytes -= 8, p += 8) {
        const uint32_t low = crc ^ (p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
        crc = TABLES[7][low & 0xFF] ^ TABLES[6][low >> 8 & 0xFF] ^ TABLES[5][low >> 16 & 0xFF] ^ TABLES[4][low >> 24] ^
              TABLES[3][p[4]] ^ TABLES[2][p[5]] ^ TABLES[1][p[6]] ^ TABLES[0][p[7]];
    }
    return byte_by_byte(crc, p, bytes);
}

#if defined(__x86_64__)

// Carry-less multiplication folds 64 bytes per step (V. Gopal et al., "Fast CRC Computation for Generic Polynomials
// Using PCLMULQDQ", Intel 2009). The constants are powers of x modulo the polynomial; their names are the paper's.
__attribute__((target("pclmul,sse4.1"))) uint32_t folded(uint32_t crc, const uint8_t* data, size_t bytes) {
    if (bytes < 64) return byte_by_byte(crc, data, bytes);
    const __m128i k1k2 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i k3k4 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i k5 = _mm_set_epi64x(0, 0x0163cd6124);
    const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i even = _mm_setr_epi32(~0, 0, ~0, 0);
    const auto load = [](const uint8_t* p) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    };
    const auto fold = [](__m128i x, __m128i k, __m128i next) __attribute__((target("pclmul,sse4.1"))) {
        const __m128i low = _mm_clmulepi64_si128(x, k, 0x00);
        return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x11), low), next);
    };
    __m128i x0 = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(crc)));
    __m128i x1 = load(data + 16), x2 = load(data + 32), x3 = load(data + 48);
    for (data += 64, bytes -= 64; bytes >= 64; data += 64, bytes -= 64) {
        x0 = fold(x0, k1k2, load(data));
        x1 = fold(x1, k1k2, load(data + 16));
        x2 = fold(x2, k1k2, load(data + 32));
        x3 = fold(x3, k1k2, load(data + 48));
    }
    x0 = fold(fold(fold(x0, k3k4, x1), k3k4, x2), k3k4, x3);
    for (; bytes >= 16; data += 16, bytes -= 16) x0 = fold(x0, k3k4, load(data));
    // 128 bits to 64, then to 32.
    x0 = _mm_xor_si128(_mm_srli_si128(x0, 8), _mm_clmulepi64_si128(x0, k3k4, 0x10));
    x0 = _mm_xor_si128(_mm_srli_si128(x0, 4), _mm_clmulepi64_si128(_mm_and_si128(x0, even), k5, 0x00));
    __m128i q = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(x0, even), barrett, 0x10), even);
    x0 = _mm_xor_si128(x0, _mm_clmulepi64_si128(q, barrett, 0x00));
    return byte_by_byte(static_cast<uint32_t>(_mm_extract_epi32(x0, 1)), data, bytes);
}

bool has_folding() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

#elif defined(__aarch64__) && defined(__linux__)

__attribute__((target("+crc"))) uint32_t folded(uint32_t crc, const uint8_t* data, size_t bytes) {
    for (; bytes >= 8; bytes -= 8, data += 8) {
        uint64_t word;
        std::memcpy(&word, data, 8);
        crc = __crc32d(crc, word);
    }
    return byte_by_byte(crc, data, bytes);
}

bool has_folding() { return getauxval(AT_HWCAP) & HWCAP_CRC32; }

#else

constexpr auto folded = from_tables;
bool has_folding() { return false; }

#endif

}  // namespace

uint32_t crc32(const uint8_t* data, size_t bytes) {
    static const auto best = has_folding() ? folded : from_tables;
    return ~best(~0u, data, bytes);
}

uint32_t crc32_portable(const uint8_t* data, size_t bytes) { return ~from_tables(~0u, data, bytes); }

}  // namespace flashrt::io
