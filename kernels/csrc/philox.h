// Philox-4x32-10 (Salmon et al., SC 2011, "Random123"): the numbers of kernels/philox.py, on host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ENGINE_HOST_DEVICE __host__ __device__
#else
#define ENGINE_HOST_DEVICE
#endif

namespace engine {

// Use of the numbers, the last word of the counter: of `Stream` in kernels/philox.py those that C++ needs.
enum Stream : uint32_t { AUGMENT = 0, ATTACK_START = 1 };

// The words of the counters (block + n, sample, epoch, stream), n in [0, COUNT), under a key of 64 bits: words[k][n].
// Static, as cpu.h tells why.
template <int COUNT>
ENGINE_HOST_DEVICE static inline void philox(
    uint32_t (&words)[4][COUNT], uint32_t block, uint32_t sample, uint32_t epoch, uint32_t stream, uint64_t seed) {
    for (int n = 0; n < COUNT; ++n) {
        words[0][n] = block + static_cast<uint32_t>(n);
        words[1][n] = sample;
        words[2][n] = epoch;
        words[3][n] = stream;
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma omp simd
        for (int n = 0; n < COUNT; ++n) {
            const uint64_t product0 = uint64_t{0xD2511F53u} * words[0][n];
            const uint64_t product1 = uint64_t{0xCD9E8D57u} * words[2][n];
            words[0][n] = static_cast<uint32_t>(product1 >> 32) ^ words[1][n] ^ key0;
            words[1][n] = static_cast<uint32_t>(product1);
            words[2][n] = static_cast<uint32_t>(product0 >> 32) ^ words[3][n] ^ key1;
            words[3][n] = static_cast<uint32_t>(product0);
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

}  // namespace engine
