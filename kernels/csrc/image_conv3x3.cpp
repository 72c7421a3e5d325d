// The first convolution of a network, 3x3 on images in channels-last, with the normalisation of the images, and its
// gradient to them: kernels/layers/image_conv3x3.py.
//
// Forward a vector holds channels of a pixel, each a sum of 27 products. Backward a vector holds parts of the gradient
// of one colour of a pixel, by channels, and is summed over its lanes once at the end. Every result is computed by one
// sequence of operations, whatever block or thread it falls into.
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "linf.h"

namespace engine {
namespace ENGINE_SET {
namespace {

// SUMS vectors of sums forward. Backward AT_ONCE pixels, whose sums of three colours fill the registers with three
// vectors of weights and one of the gradient.
#if defined(__AVX512F__)
constexpr int LANES = 16, AT_ONCE = 8, SUMS = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8, AT_ONCE = 4, SUMS = 8;
#else
constexpr int LANES = 4, AT_ONCE = 4, SUMS = 8;
#endif
constexpr int RGB = 3, TAPS = 9, PRODUCTS = RGB * TAPS;
constexpr int64_t BAND = 8;       // rows of an image that are computed together
constexpr int64_t GRAIN = 32768;  // numbers of a map that are worth a thread

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
void keep(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

inline void store(float value, float& to) { to = value; }
inline void store(float value, BFloat16& to) { to = to_bfloat16(value); }

constexpr int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Memory of floats; null where there is none.
struct Buffer {
    float* floats;

    explicit Buffer(int64_t size)
        : floats(static_cast<float*>(aligned_alloc(64, sizeof(float) * round_up(size, 16)))) {}
    ~Buffer() { free(floats); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
};

// A call, its weights as the loops read them, and how its images are divided into bands of rows.
template <typename Arguments>
struct Call {
    const Arguments& given;
    const int64_t padded, bands;  // padded: channels in whole vectors
    const Buffer weights;         // of (PRODUCTS, padded)
    int status = OK;

    explicit Call(const Arguments& given)
        : given(given), padded(round_up(given.channels, LANES)), bands((given.height + BAND - 1) / BAND),
          weights(PRODUCTS * padded) {}

    void fail() { __atomic_store_n(&status, OUT_OF_MEMORY, __ATOMIC_RELAXED); }

    int run(Body body) {
        if (!weights.floats) return OUT_OF_MEMORY;
        const int64_t size = BAND * given.width * given.channels;
        parallel_for(0, given.batch * bands, 1 + GRAIN / size, body, this);
        return status;
    }
};

// Rows of an image.
struct Rows {
    int64_t sample, begin, end;

    Rows(int64_t band, int64_t bands, int64_t height) : sample(band / bands), begin(band % bands * BAND) {
        end = begin + BAND < height ? begin + BAND : height;
    }
};

// ---------------------------------------------------------------- forward

using Forward = Call<ImageConvArguments>;

// (PRODUCTS, padded), the products in the order of a pixel's neighbours in memory.
void pack_forward(const Forward& call) {
    for (int k = 0; k < PRODUCTS; ++k) {
        float* to = call.weights.floats + k * call.padded;
        for (int64_t o = 0; o < call.padded; ++o)
            to[o] = o < call.given.channels ? call.given.weight[o * PRODUCTS + k] : 0;
    }
}

// One row (1 + width + 1, RGB) of normalised images between zeros, which the buffer holds beside it; 0 outside.
void normalise(const ImageConvArguments& given, int64_t sample, int64_t row, float* to) {
    const int64_t size = given.width * RGB;
    to += RGB;
    if (row < 0 || row >= given.height) {
        memset(to, 0, sizeof(float) * size);
        return;
    }
    const float* from = given.images + (sample * given.height + row) * size;
    if (!given.std) {
        memcpy(to, from, sizeof(float) * size);
        return;
    }
    float mean[RGB * LANES], std[RGB * LANES];
    for (int i = 0; i < RGB * LANES; ++i) mean[i] = given.mean[i % RGB], std[i] = given.std[i % RGB];
    for (int64_t first = 0; first < size; first += RGB * LANES) {
        const int64_t count = size - first < RGB * LANES ? size - first : RGB * LANES;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[first + i] = (from[first + i] - mean[i]) / std[i];
    }
}

// VECTORS vectors of channels, from the channel `first`, of a row's outputs. window: (3, stride), normalised rows.
template <typename T, int VECTORS>
void convolve(const Forward& call, const float* window, int64_t stride, int64_t first, T* y) {
    constexpr int PIXELS = SUMS / VECTORS, WIDTH = VECTORS * LANES;
    const ImageConvArguments& given = call.given;
    const int64_t channels = given.channels, count = channels - first < WIDTH ? channels - first : WIDTH;
    float bias[WIDTH];
    for (int o = 0; o < WIDTH; ++o) bias[o] = given.bias && o < count ? given.bias[first + o] : 0;
    for (int64_t pixel = 0; pixel < given.width; pixel += PIXELS) {
        Vector sums[PIXELS][VECTORS] = {};
        const float* weight = call.weights.floats + first;
        for (int row = 0; row < 3; ++row) {
            const float* from = window + row * stride + pixel * RGB;
#pragma GCC unroll 9
            for (int k = 0; k < 3 * RGB; ++k, weight += call.padded) {
#pragma GCC unroll 16
                for (int p = 0; p < PIXELS; ++p) {
                    const float number = from[p * RGB + k];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) sums[p][v] += number * load(weight + v * LANES);
                }
            }
        }
        float block[PIXELS][WIDTH];
#pragma GCC unroll 16
        for (int p = 0; p < PIXELS; ++p)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) keep(&block[p][v * LANES], sums[p][v] + load(bias + v * LANES));
        const int64_t pixels = given.width - pixel < PIXELS ? given.width - pixel : PIXELS;
        for (int64_t p = 0; p < pixels; ++p) {
            T* to = y + (pixel + p) * channels + first;
            if (count == WIDTH) {
#pragma omp simd
                for (int o = 0; o < WIDTH; ++o) store(block[p][o], to[o]);
            } else {
#pragma omp simd
                for (int64_t o = 0; o < count; ++o) store(block[p][o], to[o]);
            }
        }
    }
}

template <typename T>
void forward_bands(int64_t begin, int64_t end, void* context) {
    Forward& call = *static_cast<Forward*>(context);
    const ImageConvArguments& given = call.given;
    const int64_t stride = (round_up(given.width, SUMS) + 2) * RGB;  // the last block reads whole pixels
    const Buffer window((BAND + 2) * stride);
    if (!window.floats) return call.fail();
    memset(window.floats, 0, sizeof(float) * (BAND + 2) * stride);
    for (int64_t band = begin; band < end; ++band) {
        const Rows rows(band, call.bands, given.height);
        for (int64_t row = rows.begin - 1; row <= rows.end; ++row)
            normalise(given, rows.sample, row, window.floats + (row - rows.begin + 1) * stride);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            const float* seen = window.floats + (row - rows.begin) * stride;
            T* y = static_cast<T*>(given.y) +
                   (rows.sample * given.height + row) * given.width * given.channels;
            int64_t first = 0;
            for (; first + LANES < call.padded; first += 2 * LANES) convolve<T, 2>(call, seen, stride, first, y);
            if (first < call.padded) convolve<T, 1>(call, seen, stride, first, y);
        }
    }
}

// ---------------------------------------------------------------- backward

using Backward = Call<ImageGradientArguments>;

// (TAPS, RGB, padded): the weights between a pixel and the outputs around it, which are the taps in reverse.
void pack_backward(const Backward& call) {
    for (int k = 0; k < PRODUCTS; ++k) {
        const int place = (TAPS - 1 - k / RGB) * RGB + k % RGB;
        float* to = call.weights.floats + k * call.padded;
        for (int64_t o = 0; o < call.padded; ++o)
            to[o] = o < call.given.channels ? call.given.weight[o * PRODUCTS + place] : 0;
    }
}

// One row (1 + width + 1, padded) of the gradient in float32 between zeros, which the buffer holds beside it.
template <typename T>
void widen(const Backward& call, int64_t sample, int64_t row, float* to) {
    const ImageGradientArguments& given = call.given;
    const int64_t channels = given.channels, padded = call.padded;
    to += padded;
    if (row < 0 || row >= given.height) {
        memset(to, 0, sizeof(float) * given.width * padded);
        return;
    }
    const T* from = static_cast<const T*>(given.grad) + (sample * given.height + row) * given.width * channels;
    if (channels == padded) {
#pragma omp simd
        for (int64_t i = 0; i < given.width * padded; ++i) to[i] = to_float(from[i]);
        return;
    }
    for (int64_t pixel = 0; pixel < given.width; ++pixel)
#pragma omp simd
        for (int64_t o = 0; o < channels; ++o) to[pixel * padded + o] = to_float(from[pixel * channels + o]);
}

// The numbers of the lanes, as a type.
template <int... I>
struct Lanes {};
template <int COUNT, int... I>
struct Count : Count<COUNT - 1, COUNT - 1, I...> {};
template <int... I>
struct Count<0, I...> {
    using All = Lanes<I...>;
};

// Of each 2 HALF lanes the lower or the upper half, first those of a, then those of b.
template <int HALF, bool UPPER, int... I>
__attribute__((always_inline)) inline Vector halves(Vector a, Vector b, Lanes<I...>) {
    return Vector{(2 * I < LANES ? a : b)[2 * I % LANES / (2 * HALF) * (2 * HALF) + I % HALF + UPPER * HALF]...};
}

// LANES / HALF vectors, each summed to HALF lanes.
template <int HALF>
__attribute__((always_inline)) inline Vector totals(const Vector* sums) {
    if constexpr (HALF == LANES) {
        return sums[0];
    } else {
        using All = typename Count<LANES>::All;
        const Vector a = totals<2 * HALF>(sums), b = totals<2 * HALF>(sums + LANES / (2 * HALF));
        return halves<HALF, false>(a, b, All()) + halves<HALF, true>(a, b, All());
    }
}

// AT_ONCE pixels' sums (AT_ONCE, RGB). rows: of the gradient, from the pixel to the left of the first one.
__attribute__((always_inline)) inline void gather(
    const Backward& call, const float* const (&rows)[3], int64_t pixel, Vector* sums) {
    const int64_t padded = call.padded;
    Vector sum[AT_ONCE][RGB] = {};
    const float* weight = call.weights.floats;
    for (int row = 0; row < 3; ++row) {
        for (int column = 0; column < 3; ++column, weight += RGB * padded) {
            const float* from = rows[row] + (pixel + column) * padded;
            for (int64_t o = 0; o < padded; o += LANES) {
                const Vector red = load(weight + o), green = load(weight + padded + o);
                const Vector blue = load(weight + 2 * padded + o);
#pragma GCC unroll 8
                for (int p = 0; p < AT_ONCE; ++p) {
                    const Vector grad = load(from + p * padded + o);
                    sum[p][0] += grad * red;
                    sum[p][1] += grad * green;
                    sum[p][2] += grad * blue;
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < AT_ONCE; ++p)
        for (int c = 0; c < RGB; ++c) sums[p * RGB + c] = sum[p][c];
}

// The gradient of a row of images (width, RGB), of which whole vectors are written.
void row_gradient(const Backward& call, const float* const (&rows)[3], float* to) {
    const ImageGradientArguments& given = call.given;
    Vector sums[LANES * RGB] = {};
    for (int64_t pixel = 0; pixel < given.width; pixel += LANES) {
        for (int part = 0; part < LANES && pixel + part < given.width; part += AT_ONCE)
            gather(call, rows, pixel + part, sums + part * RGB);
        for (int c = 0; c < RGB; ++c) keep(to + pixel * RGB + c * LANES, totals<1>(sums + c * LANES));
    }
    if (!given.std) return;
    const int64_t size = given.width * RGB;
    float std[RGB * LANES];
    for (int i = 0; i < RGB * LANES; ++i) std[i] = given.std[i % RGB];
    for (int64_t first = 0; first < size; first += RGB * LANES) {
#pragma omp simd
        for (int64_t i = 0; i < RGB * LANES; ++i) to[first + i] /= std[i];
    }
}

template <typename T>
void backward_bands(int64_t begin, int64_t end, void* context) {
    Backward& call = *static_cast<Backward*>(context);
    const ImageGradientArguments& given = call.given;
    const int64_t size = given.width * RGB, stride = (round_up(given.width, AT_ONCE) + 2) * call.padded;
    const Buffer window(3 * stride), row_buffer(round_up(size, RGB * LANES));
    if (!window.floats || !row_buffer.floats) return call.fail();
    memset(window.floats, 0, sizeof(float) * 3 * stride);
    Counts counts;
    for (int64_t band = begin; band < end; ++band) {
        const Rows band_rows(band, call.bands, given.height);
        const auto place = [&](int64_t row) { return window.floats + (row + 3) % 3 * stride; };
        widen<T>(call, band_rows.sample, band_rows.begin - 1, place(band_rows.begin - 1));
        widen<T>(call, band_rows.sample, band_rows.begin, place(band_rows.begin));
        for (int64_t row = band_rows.begin; row < band_rows.end; ++row) {
            widen<T>(call, band_rows.sample, row + 1, place(row + 1));
            const float* const rows[3] = {place(row - 1), place(row), place(row + 1)};
            row_gradient(call, rows, row_buffer.floats);
            const int64_t first = (band_rows.sample * given.height + row) * size;
            if (given.of_images) {
                memcpy(given.of_images + first, row_buffer.floats, sizeof(float) * size);
            } else {
                move_linf(
                    row_buffer.floats, given.x_nat + first, given.x_adv + first, size, given.epsilon,
                    given.step_size, counts);
            }
        }
    }
    if (!given.of_images) counts.add_to(given.counts);
}

}  // namespace

int image_conv3x3(const ImageConvArguments& given) {
    Forward call(given);
    if (call.weights.floats) pack_forward(call);
    return call.run(given.dtype == BFLOAT16 ? forward_bands<BFloat16> : forward_bands<float>);
}

int image_conv3x3_backward(const ImageGradientArguments& given) {
    Backward call(given);
    if (call.weights.floats) pack_backward(call);
    return call.run(given.dtype == BFLOAT16 ? backward_bands<BFloat16> : backward_bands<float>);
}

}  // namespace ENGINE_SET
}  // namespace engine
