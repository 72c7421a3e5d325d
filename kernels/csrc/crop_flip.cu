// Random crop and flip of uint8 images, in one launch: kernels/crop_flip.py says what it computes.
#undef NDEBUG  // the index of an image is asserted in every build
#include <algorithm>
#include <cassert>
#include <cstdint>

#include "launch.cuh"
#include "philox.h"

namespace engine {
namespace {

constexpr int THREADS = 256;
constexpr int PACKS_PER_THREAD = 4;      // so that a thread pays for Philox once in 16 values
constexpr int64_t MAX_PIXELS = 1 << 27;  // of an image: counted in 32 bits, and the blocks of a sample in 16

struct Shape {
    int height, width, channels;
};

struct Augmentation {
    uint64_t seed;
    uint32_t epoch;
    int padding;
    bool flip, enabled;
};

// Position of a view in its image.
struct View {
    int row = 0, column = 0;
    bool flipped = false;
};

__device__ View view_of(int64_t sample, const Augmentation& augmentation) {
    if (!augmentation.enabled) return {};
    uint32_t words[4][1];
    philox(words, 0, static_cast<uint32_t>(sample), augmentation.epoch, AUGMENT, augmentation.seed);
    const uint64_t offsets = 2 * augmentation.padding + 1;
    return {
        static_cast<int>(words[0][0] * offsets >> 32) - augmentation.padding,
        static_cast<int>(words[1][0] * offsets >> 32) - augmentation.padding,
        augmentation.flip && words[2][0] >> 31,
    };
}

// value / 255, correctly rounded: a product with the reciprocal, which can be an ulp off, and the rest of that.
__device__ float unit(float value) {
    constexpr float RECIPROCAL = 1.0f / 255.0f;
    const float quotient = value * RECIPROCAL;
    return fmaf(fmaf(-255.0f, quotient, value), RECIPROCAL, quotient);
}

// A row of blocks per sample. Views are channels-last, so that neighbours in memory are channels, then columns.
template <bool WIDE>
__global__ void __launch_bounds__(THREADS) crop_flip(
    float* __restrict__ x, int64_t* __restrict__ labels_out, const uint8_t* __restrict__ images,
    const int64_t* __restrict__ labels, const int64_t* __restrict__ samples, const int64_t* __restrict__ indices,
    int64_t num_images, Shape shape, Augmentation augmentation) {
    constexpr int WIDTH = WIDE ? ACCESS_BYTES / sizeof(float) : 1;
    const int64_t sample = samples[blockIdx.x], index = indices ? indices[blockIdx.x] : sample;
    const bool is_known = 0 <= index && index < num_images;
    assert(is_known);
    if (!is_known) return;  // an assertion that has failed may not stop the thread at once

    if (blockIdx.y == 0 && threadIdx.x == 0) labels_out[blockIdx.x] = labels[index];
    const auto [height, width, channels] = shape;
    const int pixels = height * width * channels;
    x += int64_t{blockIdx.x} * pixels;
    images += index * pixels;
    const View view = view_of(sample, augmentation);
    for (int pack = blockIdx.y * THREADS + threadIdx.x; pack < pixels / WIDTH; pack += gridDim.y * THREADS) {
        int channel = pack * WIDTH % channels;
        int column = pack * WIDTH / channels % width;
        int row = pack * WIDTH / channels / width;
        Pack<float, WIDTH> values;
        for (float& value : values.values) {
            const int from_row = row + view.row;
            const int from_column = (view.flipped ? width - 1 - column : column) + view.column;
            const bool is_inside = 0 <= from_row && from_row < height && 0 <= from_column && from_column < width;
            value = is_inside ? unit(images[(from_row * width + from_column) * channels + channel]) : 0.0f;
            if (++channel < channels) continue;
            channel = 0;
            if (++column < width) continue;
            column = 0;
            ++row;
        }
        store<WIDTH>(x + pack * WIDTH, values);
    }
}

}  // namespace
}  // namespace engine

// Returns 0 or a cudaError_t.
ENGINE_API int engine_cuda_crop_flip(
    float* x, int64_t* labels_out, const uint8_t* images, const int64_t* labels, const int64_t* sample,
    const int64_t* index, int64_t batch, int64_t num_images, int height, int width, int channels, uint64_t seed,
    uint32_t epoch, int padding, int flip, int augment, void* stream) {
    constexpr int WIDTH = engine::ACCESS_BYTES / sizeof(float);
    constexpr int PER_BLOCK = engine::THREADS * engine::PACKS_PER_THREAD * WIDTH;
    if (batch == 0) return cudaSuccess;
    const int64_t pixels = int64_t{height} * width * channels;
    if (pixels > engine::MAX_PIXELS) return cudaErrorInvalidValue;
    const dim3 grid(batch, std::max<int64_t>((pixels + PER_BLOCK - 1) / PER_BLOCK, 1));
    return engine::with_flag(engine::is_aligned(x) && pixels % WIDTH == 0, [&](auto wide) {
        return engine::launch(
            engine::crop_flip<decltype(wide)::value>, grid, engine::THREADS, stream, x, labels_out, images, labels,
            sample, index, num_images, engine::Shape{height, width, channels},
            engine::Augmentation{seed, epoch, padding, flip != 0, augment != 0});
    });
}

ENGINE_API const char* engine_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
