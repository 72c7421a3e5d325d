// The uniform random start of an attack in an L-inf ball, the one kind of start that is computed here:
// kernels/random_start.py says what it is.
#include "cpu.h"

#include "philox.h"

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int64_t GRAIN = 8192;  // numbers that are worth a thread

void start_range(int64_t begin, int64_t end, void* context) {
    const StartArguments& call = *static_cast<const StartArguments*>(context);
    const int64_t size = call.channels * call.pixels;
    for (int64_t i = begin; i < end; ++i) {
        float* noise = call.noise + i * size;
        // Number n of a sample belongs to channel n / pixels, in either layout.
        int64_t channel = 0, pixel = 0;
        for (int64_t n = 0; n < size; n += 4) {
            const Words words = philox(
                static_cast<uint32_t>(n / 4), static_cast<uint32_t>(call.sample[i]), call.counter, ATTACK_START,
                call.seed);
            for (int k = 0; k < 4 && n + k < size; ++k) {
                const float uniform = static_cast<float>(words.values[k] >> 8) * 0x1p-24f;  // exact, as 2 u - 1 is
                const int64_t at = call.channels_last ? pixel * call.channels + channel : n + k;
                noise[at] = call.epsilon * (2.0f * uniform - 1.0f);
                if (++pixel == call.pixels) pixel = 0, ++channel;
            }
        }
    }
}

}  // namespace

void random_start(const StartArguments& call) {
    const int64_t size = call.channels * call.pixels;
    if (!call.batch || !size) return;
    parallel_for(
        0, call.batch, size < GRAIN ? GRAIN / size : 1, start_range, const_cast<StartArguments*>(&call));
}

}  // namespace ENGINE_SET
}  // namespace engine
