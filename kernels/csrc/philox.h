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

struct Words {
    uint32_t values[4];
};

// The words of the counter (block, sample, epoch, stream) under a key of 64 bits. Static, as cpu.h tells why.
ENGINE_HOST_DEVICE static inline Words philox(
    uint32_t block, uint32_t sample, uint32_t epoch, uint32_t stream, uint64_t seed) {
    uint32_t counter[4] = {block, sample, epoch, stream};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
        counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0];
        counter[1] = static_cast<uint32_t>(product1);
        counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1];
        counter[3] = static_cast<uint32_t>(product0);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return {{counter[0], counter[1], counter[2], counter[3]}};
}

}  // namespace engine
