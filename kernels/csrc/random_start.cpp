// The uniform random start of an attack in an L-inf ball, the one kind of start that is computed here:
// kernels/random_start.py says what it is.
#include "cpu.h"

#include "philox.h"

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int64_t GRAIN = 8192;  // numbers that are worth a thread
constexpr int LANES = 16;        // counters at a time, in one vector; each gives four numbers
constexpr int CHUNK = 4 * LANES;

// Numbers first .. first + CHUNK - 1 of a sample.
void start_chunk(const StartArguments& call, int64_t sample, int64_t first, float* numbers) {
    uint32_t words[4][LANES];
    philox(
        words, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(sample), call.counter, ATTACK_START, call.seed);
    for (int lane = 0; lane < LANES; ++lane)
        for (int k = 0; k < 4; ++k) {
            // 24 bits, so that the conversion is exact, as 2 u - 1 is.
            const float uniform = static_cast<float>(static_cast<int32_t>(words[k][lane] >> 8)) * 0x1p-24f;
            numbers[4 * lane + k] = call.epsilon * (2.0f * uniform - 1.0f);
        }
}

void start_range(int64_t begin, int64_t end, void* context) {
    const StartArguments& call = *static_cast<const StartArguments*>(context);
    const int64_t size = call.channels * call.pixels;
    for (int64_t i = begin; i < end; ++i) {
        float* noise = call.noise + i * size;
        // Number n of a sample belongs to channel n / pixels, in either layout.
        int64_t channel = 0, pixel = 0;
        for (int64_t first = 0; first < size; first += CHUNK) {
            float numbers[CHUNK];
            start_chunk(call, call.sample[i], first, numbers);
            const int64_t count = size - first < CHUNK ? size - first : CHUNK;
            for (int64_t n = 0; n < count; ++n) {
                noise[call.channels_last ? pixel * call.channels + channel : first + n] = numbers[n];
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
