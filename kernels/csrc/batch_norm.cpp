// BatchNorm by the statistics of the batch, with the addition and the ReLU after it: kernels/layers/batch_norm.py.
//
// A map is read as rows of all channels, in chunks whose size depends on nothing but the shape. Each chunk has sums of
// its own, which are joined in their order: so the bits do not depend on the number of threads.
#include "cpu.h"

#include <math.h>
#include <stdlib.h>

#include "numbers.h"

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int64_t CHUNK = 16384;  // values of a chunk, about: what a core's inner caches hold
constexpr int64_t GRAIN = 2;      // chunks that are worth a thread
constexpr int64_t WIDTH = 128;    // values, of several rows where channels are few, that one loop goes over

// How a map is divided. width: of as many whole rows as are summed side by side.
struct Division {
    int64_t channels, size, width, per_chunk, chunks;

    Division(int64_t rows, int64_t channels) : channels(channels), size(rows * channels) {
        width = channels * (channels < WIDTH ? WIDTH / channels : 1);
        per_chunk = width * (1 + (CHUNK - 1) / width);
        chunks = (size + per_chunk - 1) / per_chunk;
    }

    int64_t begin(int64_t chunk) const { return chunk * per_chunk; }
    int64_t end(int64_t chunk) const { return chunk + 1 < chunks ? (chunk + 1) * per_chunk : size; }
    int64_t rows(int64_t chunk) const { return (end(chunk) - begin(chunk)) / channels; }
};

// Memory of a call, in one piece: two sums of each chunk, numbers of each channel repeated over the width, totals.
struct Workspace {
    float *partials, *repeated;
    double* totals;

    Workspace(const Division& division, int numbers) {
        const size_t floats = (2 * division.chunks + numbers) * division.width;
        totals = static_cast<double*>(malloc(2 * division.channels * sizeof(double) + floats * sizeof(float)));
        partials = reinterpret_cast<float*>(totals + 2 * division.channels);
        repeated = partials + 2 * division.chunks * division.width;
    }
    ~Workspace() { free(totals); }
};

inline void store(float value, float& to) { to = value; }
inline void store(float value, BFloat16& to) { to = to_bfloat16(value); }

// NaN stays, as in torch.
inline float relu(float value) { return value < 0.0f ? 0.0f : value; }
inline float masked(float grad, float output) { return output <= 0.0f ? 0.0f : grad; }

// Adds value(i, w) of all i of [begin, end) to sums[w], w the place of i in the width.
template <typename Value>
void accumulate(int64_t begin, int64_t end, int64_t width, float* sums, Value value) {
    int64_t i = begin;
    for (; i + 4 * width <= end; i += 4 * width) {
#pragma omp simd
        for (int64_t w = 0; w < width; ++w)
            sums[w] += (value(i + w, w) + value(i + width + w, w)) +
                       (value(i + 2 * width + w, w) + value(i + 3 * width + w, w));
    }
    for (; i < end; i += width) {
        const int64_t count = end - i < width ? end - i : width;
#pragma omp simd
        for (int64_t w = 0; w < count; ++w) sums[w] += value(i + w, w);
    }
}

// Adds the rows that were summed side by side into the first one.
void fold(float* sums, const Division& division) {
    for (int64_t row = division.channels; row < division.width; row += division.channels) {
#pragma omp simd
        for (int64_t c = 0; c < division.channels; ++c) sums[c] += sums[row + c];
    }
}

void repeat(float* numbers, const Division& division) {
    for (int64_t w = division.channels; w < division.width; ++w) numbers[w] = numbers[w - division.channels];
}

void clear(float* numbers, int64_t count) {
    for (int64_t w = 0; w < count; ++w) numbers[w] = 0;
}

// ---------------------------------------------------------------- forward

struct Forward {
    const NormArguments& call;
    const Division division;
    const Workspace space;

    explicit Forward(const NormArguments& call)
        : call(call), division(call.rows, call.channels), space(division, 3) {}
};

// Mean and sum of squared deviations of each chunk, which it is read twice for while a cache holds it.
template <typename T>
void chunk_statistics(int64_t begin, int64_t end, void* context) {
    const Forward& forward = *static_cast<const Forward*>(context);
    const Division& division = forward.division;
    const T* x = static_cast<const T*>(forward.call.x);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = division.begin(chunk), last = division.end(chunk);
        float *mean = forward.space.partials + 2 * chunk * division.width, *squares = mean + division.width;
        clear(mean, 2 * division.width);
        accumulate(first, last, division.width, mean, [=](int64_t i, int64_t) { return to_float(x[i]); });
        fold(mean, division);
        const float count = static_cast<float>(division.rows(chunk));
        for (int64_t c = 0; c < division.channels; ++c) mean[c] /= count;
        repeat(mean, division);
        accumulate(first, last, division.width, squares, [=](int64_t i, int64_t w) {
            const float deviation = to_float(x[i]) - mean[w];
            return deviation * deviation;
        });
        fold(squares, division);
    }
}

// Joins the chunks' means and squares (Chan's way), and writes what is made of them.
void finish_statistics(const Forward& forward) {
    const NormArguments& call = forward.call;
    const Division& division = forward.division;
    const int64_t channels = division.channels, width = division.width;
    const double rows = static_cast<double>(call.rows);
    double *means = forward.space.totals, *squares = means + channels;
    for (int64_t c = 0; c < channels; ++c) means[c] = squares[c] = 0;
    for (int64_t chunk = 0; chunk < division.chunks; ++chunk) {
        const float* mean = forward.space.partials + 2 * chunk * width;
        const double part = division.rows(chunk) / rows;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) means[c] += part * mean[c];
    }
    for (int64_t chunk = 0; chunk < division.chunks; ++chunk) {
        const float *mean = forward.space.partials + 2 * chunk * width, *square = mean + width;
        const double count = static_cast<double>(division.rows(chunk));
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
            const double apart = mean[c] - means[c];
            squares[c] += square[c] + count * (apart * apart);
        }
    }
    float *mean = forward.space.repeated, *scale = mean + width, *bias = scale + width;
    for (int64_t c = 0; c < channels; ++c) {
        const float rstd = static_cast<float>(1 / sqrt(squares[c] / rows + call.eps));
        call.statistics[c] = mean[c] = static_cast<float>(means[c]);
        call.statistics[channels + c] = rstd;
        scale[c] = rstd * call.weight[c];
        bias[c] = call.bias[c];
        if (call.running_mean) {
            const double keep = 1 - call.momentum, unbiased = squares[c] / (rows - 1);
            call.running_mean[c] = static_cast<float>(call.momentum * means[c] + keep * call.running_mean[c]);
            call.running_var[c] = static_cast<float>(call.momentum * unbiased + keep * call.running_var[c]);
        }
    }
    for (int row = 0; row < 3; ++row) repeat(mean + row * width, division);
}

template <typename T, bool HAS_RESIDUAL, bool RELU>
void apply(int64_t begin, int64_t end, void* context) {
    const Forward& forward = *static_cast<const Forward*>(context);
    const int64_t width = forward.division.width;
    const float *mean = forward.space.repeated, *scale = mean + width, *bias = scale + width;
    const T *x = static_cast<const T*>(forward.call.x), *residual = static_cast<const T*>(forward.call.residual);
    T* y = static_cast<T*>(forward.call.y);
    // Backwards: what was read last is the likeliest to be in a cache yet.
    for (int64_t chunk = end; chunk-- > begin;) {
        const int64_t last = forward.division.end(chunk);
        for (int64_t i = forward.division.begin(chunk); i < last; i += width) {
            const int64_t count = last - i < width ? last - i : width;
#pragma omp simd
            for (int64_t w = 0; w < count; ++w) {
                float value = (to_float(x[i + w]) - mean[w]) * scale[w] + bias[w];
                if (HAS_RESIDUAL) value += to_float(residual[i + w]);
                store(RELU ? relu(value) : value, y[i + w]);
            }
        }
    }
}

template <typename T>
int forward_of(const NormArguments& call) {
    Forward forward(call);
    if (!forward.space.totals) return OUT_OF_MEMORY;
    parallel_for(0, forward.division.chunks, GRAIN, chunk_statistics<T>, &forward);
    finish_statistics(forward);
    const Body plain = call.relu ? apply<T, false, true> : apply<T, false, false>;
    const Body added = call.relu ? apply<T, true, true> : apply<T, true, false>;
    parallel_for(0, forward.division.chunks, GRAIN, call.residual ? added : plain, &forward);
    return OK;
}

// ---------------------------------------------------------------- backward

// Where the ReLU let its input through is told by the output, or by computing it again.
enum Mask { NO_RELU, OF_Y, OF_X };

struct Backward {
    const NormGradientArguments& call;
    const Division division;
    const Workspace space;

    explicit Backward(const NormGradientArguments& call)
        : call(call), division(call.rows, call.channels), space(division, 5) {}
};

// Of each chunk the sums of g and g (x - mean), g the gradient that the ReLU lets through; with `OF_Y` g is written.
template <typename T, Mask MASK>
void chunk_sums(int64_t begin, int64_t end, void* context) {
    const Backward& backward = *static_cast<const Backward*>(context);
    const Division& division = backward.division;
    const int64_t width = division.width;
    const float *mean = backward.space.repeated, *scale = mean + width, *bias = scale + width;
    const T *grad = static_cast<const T*>(backward.call.grad), *x = static_cast<const T*>(backward.call.x);
    const T* y = static_cast<const T*>(backward.call.y);
    T* grad_residual = static_cast<T*>(backward.call.grad_residual);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        float *sums = backward.space.partials + 2 * chunk * width, *products = sums + width;
        clear(sums, 2 * width);
        const int64_t last = division.end(chunk);
        for (int64_t i = division.begin(chunk); i < last; i += width) {
            const int64_t count = last - i < width ? last - i : width;
#pragma omp simd
            for (int64_t w = 0; w < count; ++w) {
                const float deviation = to_float(x[i + w]) - mean[w];
                float g = to_float(grad[i + w]);
                if (MASK == OF_Y) {
                    g = masked(g, to_float(y[i + w]));
                    store(g, grad_residual[i + w]);
                }
                if (MASK == OF_X) g = masked(g, deviation * scale[w] + bias[w]);
                sums[w] += g;
                products[w] += g * deviation;
            }
        }
        fold(sums, division);
        fold(products, division);
    }
}

void prepare(const Backward& backward) {
    const NormGradientArguments& call = backward.call;
    const int64_t channels = call.channels, width = backward.division.width;
    float *mean = backward.space.repeated, *scale = mean + width, *bias = scale + width;
    for (int64_t c = 0; c < channels; ++c) {
        mean[c] = call.statistics[c];
        scale[c] = call.statistics[channels + c] * call.weight[c];
        bias[c] = call.bias[c];
    }
    for (int row = 0; row < 3; ++row) repeat(mean + row * width, backward.division);
}

// grad_x = scale g - along_mean - along_var (x - mean).
void finish_sums(const Backward& backward) {
    const NormGradientArguments& call = backward.call;
    const Division& division = backward.division;
    const int64_t channels = division.channels, width = division.width;
    double *sums = backward.space.totals, *products = sums + channels;
    for (int64_t c = 0; c < channels; ++c) sums[c] = products[c] = 0;
    for (int64_t chunk = 0; chunk < division.chunks; ++chunk) {
        const float *sum = backward.space.partials + 2 * chunk * width, *product = sum + width;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
            sums[c] += sum[c];
            products[c] += product[c];
        }
    }
    float *along_mean = backward.space.repeated + 3 * width, *along_var = along_mean + width;
    for (int64_t c = 0; c < channels; ++c) {
        const double rstd = call.statistics[channels + c], scale = rstd * call.weight[c];
        call.grad_parameters[c] = static_cast<float>(rstd * products[c]);
        call.grad_parameters[channels + c] = static_cast<float>(sums[c]);
        along_mean[c] = static_cast<float>(scale * sums[c] / call.rows);
        along_var[c] = static_cast<float>(scale * rstd * rstd * products[c] / call.rows);
    }
    for (int row = 0; row < 2; ++row) repeat(along_mean + row * width, division);
}

template <typename T, Mask MASK>
void gradient(int64_t begin, int64_t end, void* context) {
    const Backward& backward = *static_cast<const Backward*>(context);
    const int64_t width = backward.division.width;
    const float *mean = backward.space.repeated, *scale = mean + width, *bias = scale + width;
    const float *along_mean = bias + width, *along_var = along_mean + width;
    // With OF_Y what the ReLU lets through was written.
    const void* through = MASK == OF_Y ? backward.call.grad_residual : backward.call.grad;
    const T *grad = static_cast<const T*>(through), *x = static_cast<const T*>(backward.call.x);
    T* grad_x = static_cast<T*>(backward.call.grad_x);
    for (int64_t chunk = end; chunk-- > begin;) {
        const int64_t last = backward.division.end(chunk);
        for (int64_t i = backward.division.begin(chunk); i < last; i += width) {
            const int64_t count = last - i < width ? last - i : width;
#pragma omp simd
            for (int64_t w = 0; w < count; ++w) {
                const float deviation = to_float(x[i + w]) - mean[w];
                float g = to_float(grad[i + w]);
                if (MASK == OF_X) g = masked(g, deviation * scale[w] + bias[w]);
                store(scale[w] * g - along_mean[w] - along_var[w] * deviation, grad_x[i + w]);
            }
        }
    }
}

template <typename T, Mask MASK>
int backward_by(const NormGradientArguments& call) {
    Backward backward(call);
    if (!backward.space.totals) return OUT_OF_MEMORY;
    prepare(backward);
    parallel_for(0, backward.division.chunks, GRAIN, chunk_sums<T, MASK>, &backward);
    finish_sums(backward);
    parallel_for(0, backward.division.chunks, GRAIN, gradient<T, MASK>, &backward);
    return OK;
}

template <typename T>
int backward_of(const NormGradientArguments& call) {
    if (!call.relu) return backward_by<T, NO_RELU>(call);
    return call.y ? backward_by<T, OF_Y>(call) : backward_by<T, OF_X>(call);
}

}  // namespace

int batch_norm(const NormArguments& call) {
    return call.dtype == BFLOAT16 ? forward_of<BFloat16>(call) : forward_of<float>(call);
}

int batch_norm_backward(const NormGradientArguments& call) {
    return call.dtype == BFLOAT16 ? backward_of<BFloat16>(call) : backward_of<float>(call);
}

}  // namespace ENGINE_SET
}  // namespace engine
