// Random crop and flip of uint8 images: kernels/crop_flip.py says what it computes.
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

#include "philox.h"

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int64_t GRAIN = 32768;  // values of a batch that are worth a thread

struct Call {
    const CropArguments& arguments;
    int status;
};

// Pixels of `channels` bytes in the opposite order. A constant number of channels makes each one or two moves.
template <int CHANNELS>
void reverse(const uint8_t* from, int64_t pixels, int64_t channels, uint8_t* to) {
    if (CHANNELS) channels = CHANNELS;
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
        for (int64_t channel = 0; channel < channels; ++channel)
            to[(pixels - 1 - pixel) * channels + channel] = from[pixel * channels + channel];
}

void reverse(const uint8_t* from, int64_t pixels, int64_t channels, uint8_t* to) {
    switch (channels) {
        case 1: return reverse<1>(from, pixels, channels, to);
        case 3: return reverse<3>(from, pixels, channels, to);
        default: return reverse<0>(from, pixels, channels, to);
    }
}

int64_t clamp(int64_t value, int64_t high) { return value < 0 ? 0 : value > high ? high : value; }

// Origin of a view in its image; pixels outside the image are 0.
struct View {
    int64_t top = 0, left = 0;
    bool flip = false;
};

View view_of(int64_t sample, const CropArguments& call) {
    if (!call.augment) return {};
    uint32_t words[4][1];
    philox(words, 0, static_cast<uint32_t>(sample), call.epoch, AUGMENT, call.seed);
    const uint64_t offsets = 2 * static_cast<uint64_t>(call.padding) + 1;
    View view;
    view.top = static_cast<int64_t>(words[0][0] * offsets >> 32) - call.padding;
    view.left = static_cast<int64_t>(words[1][0] * offsets >> 32) - call.padding;
    view.flip = call.flip && words[2][0] >> 31;
    return view;
}

// line: W * C bytes to write into.
void cut(const CropArguments& call, const uint8_t* image, const View& view, uint8_t* line, float* x) {
    const int64_t height = call.height, width = call.width, channels = call.channels, size = width * channels;
    // Columns [first, last) of the view lie in the image.
    int64_t first = clamp(-view.left, width), last = clamp(width - view.left, width);
    const int64_t source = first + view.left;
    if (view.flip) {
        const int64_t mirrored = width - last;
        last = width - first;
        first = mirrored;
    }
    memset(line, 0, size);
    for (int64_t row = 0; row < height; ++row, x += size) {
        const int64_t y = row + view.top;
        if (y < 0 || y >= height || first >= last) {
            memset(x, 0, sizeof(float) * size);
            continue;
        }
        const uint8_t* from = image + (y * width + source) * channels;
        if (view.flip)
            reverse(from, last - first, channels, line + first * channels);
        else
            memcpy(line + first * channels, from, (last - first) * channels);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) x[i] = static_cast<float>(line[i]) / 255.0f;
    }
}

void crop_range(int64_t begin, int64_t end, void* context) {
    Call& call = *static_cast<Call*>(context);
    const CropArguments& given = call.arguments;
    const int64_t line_size = given.width * given.channels, size = given.height * line_size;
    uint8_t* line = static_cast<uint8_t*>(malloc(line_size));
    if (!line) {
        __atomic_store_n(&call.status, OUT_OF_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t i = begin; i < end; ++i) {
        const int64_t index = given.index[i];
        cut(given, given.images + index * size, view_of(given.sample[i], given), line, given.x + i * size);
        given.labels_out[i] = given.labels[index];
    }
    free(line);
}

}  // namespace

int crop_flip(const CropArguments& given) {
    Call call{given, OK};
    const int64_t grain = 1 + GRAIN / (1 + given.height * given.width * given.channels);
    if (given.batch) parallel_for(0, given.batch, grain, crop_range, &call);
    return call.status;
}

}  // namespace ENGINE_SET
}  // namespace engine
