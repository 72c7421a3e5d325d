// One step of a projected-gradient attack, in place, in one launch: kernels/pgd_update.py says what it computes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "launch.cuh"

namespace engine {
namespace {

constexpr int LINF_THREADS = 256;
constexpr int LINF_MAX_BLOCKS = 2048;  // some waves on any GPU; more would only add to the atomics of the counts
constexpr int L2_THREADS = 512;

using Counts = unsigned long long;  // the int64 of the caller, as atomicAdd knows it

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Like torch's maximum and minimum, and unlike fmaxf and fminf, these let a NaN through.
__device__ float larger(float a, float b) { return a > b || a != a ? a : b; }
__device__ float smaller(float a, float b) { return a < b || a != a ? a : b; }
__device__ float clamp01(float value) { return smaller(larger(value, 0.0f), 1.0f); }

// The operations come in the same order in every run: a butterfly in each warp, then the warps one after another.
template <int THREADS, typename T, typename Operation>
__device__ T block_reduce(T value, Operation operation) {
    __shared__ T warps[THREADS / 32];
    for (int distance = 16; distance > 0; distance /= 2) {
        value = operation(value, __shfl_xor_sync(~0u, value, distance));
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    T result = warps[0];
    for (int warp = 1; warp < THREADS / 32; ++warp) result = operation(result, warps[warp]);
    __syncthreads();  // before a next call writes
    return result;
}

struct Sum {
    template <typename T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Largest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Counts of the zero and of the non-finite entries of a gradient.
template <int THREADS, bool COUNTING>
struct Tally {
    unsigned zeros = 0, non_finite = 0;

    __device__ void see(float gradient) {
        if constexpr (COUNTING) {
            zeros += gradient == 0.0f;
            non_finite += !(fabsf(gradient) <= FLT_MAX);
        }
    }

    // By all threads of a block. Integers: the order of the atomics does not matter.
    __device__ void add_to(Counts* counts) const {
        if constexpr (COUNTING) {
            const unsigned totals[2] = {
                block_reduce<THREADS>(zeros, Sum{}), block_reduce<THREADS>(non_finite, Sum{})};
            if (threadIdx.x < 2 && totals[threadIdx.x])
                atomicAdd(counts + threadIdx.x, Counts{totals[threadIdx.x]});
        }
    }
};

template <int WIDTH, typename Grad, typename Tally>
__device__ void linf_step(
    float* x_adv, const Grad* grad, const float* x_nat, float epsilon, float step_size, Tally& tally) {
    auto x = load<WIDTH>(x_adv);
    const auto g = load<WIDTH>(grad);
    const auto center = load<WIDTH>(x_nat);
    for (int k = 0; k < WIDTH; ++k) {
        const float slope = to_float(g.values[k]);
        tally.see(slope);
        const float moved = x.values[k] + (slope > 0 ? step_size : slope < 0 ? -step_size : 0.0f);
        x.values[k] = clamp01(smaller(larger(moved, center.values[k] - epsilon), center.values[k] + epsilon));
    }
    store<WIDTH>(x_adv, x);
}

template <typename Grad, bool WIDE, bool COUNTING>
__global__ void __launch_bounds__(LINF_THREADS) pgd_update_linf(
    float* x_adv, const Grad* __restrict__ grad, const float* __restrict__ x_nat, int64_t elements, float epsilon,
    float step_size, Counts* counts) {
    constexpr int WIDTH = WIDE ? ACCESS_BYTES / sizeof(Grad) : 1;
    const int64_t thread = int64_t{blockIdx.x} * LINF_THREADS + threadIdx.x;
    const int64_t packs = elements / WIDTH;
    Tally<LINF_THREADS, COUNTING> tally;
    for (int64_t pack = thread; pack < packs; pack += int64_t{gridDim.x} * LINF_THREADS) {
        const int64_t i = pack * WIDTH;
        linf_step<WIDTH>(x_adv + i, grad + i, x_nat + i, epsilon, step_size, tally);
    }
    const int64_t i = packs * WIDTH + thread;  // what is left, fewer than a pack
    if (i < elements) linf_step<1>(x_adv + i, grad + i, x_nat + i, epsilon, step_size, tally);
    tally.add_to(counts);
}

// One block per sample. Its norms take three passes and the step a fourth; from the second on it lies in the cache.
template <typename Grad, bool WIDE, bool COUNTING>
__global__ void __launch_bounds__(L2_THREADS) pgd_update_l2(
    float* x_adv, const Grad* __restrict__ grad, const float* __restrict__ x_nat, int64_t per_sample,
    float epsilon, float step_size, Counts* counts) {
    constexpr int WIDTH = WIDE ? ACCESS_BYTES / sizeof(Grad) : 1;
    const int64_t start = blockIdx.x * per_sample;
    x_adv += start;
    grad += start;
    x_nat += start;
    const auto for_each_pack = [&](auto visit) {
        for (int64_t i = int64_t{threadIdx.x} * WIDTH; i < per_sample; i += int64_t{L2_THREADS} * WIDTH) visit(i);
    };

    Tally<L2_THREADS, COUNTING> tally;
    float largest = 0;
    for_each_pack([&](int64_t i) {
        const auto g = load<WIDTH>(grad + i);
        for (int k = 0; k < WIDTH; ++k) {
            tally.see(to_float(g.values[k]));
            largest = fmaxf(largest, fabsf(to_float(g.values[k])));
        }
    });
    tally.add_to(counts);
    // First to a largest entry of 1: the squares of a tiny gradient would underflow, and its norm with them.
    const float scale = 1.0f / fmaxf(block_reduce<L2_THREADS>(largest, Largest{}), FLT_MIN);

    float squares = 0;
    for_each_pack([&](int64_t i) {
        const auto g = load<WIDTH>(grad + i);
        for (int k = 0; k < WIDTH; ++k) {
            const float slope = to_float(g.values[k]) * scale;
            squares += slope * slope;
        }
    });
    // FLT_EPSILON: the norm of the smallest scaled gradient that is not zero. A zero one moves nothing in any case.
    const float pace = step_size / larger(sqrtf(block_reduce<L2_THREADS>(squares, Sum{})), FLT_EPSILON);

    const auto delta_of = [&](float x, Grad slope, float center) {
        return x + pace * (to_float(slope) * scale) - center;
    };
    squares = 0;
    for_each_pack([&](int64_t i) {
        const auto x = load<WIDTH>(x_adv + i);
        const auto g = load<WIDTH>(grad + i);
        const auto center = load<WIDTH>(x_nat + i);
        for (int k = 0; k < WIDTH; ++k) {
            const float delta = delta_of(x.values[k], g.values[k], center.values[k]);
            squares += delta * delta;
        }
    });
    const float distance = sqrtf(block_reduce<L2_THREADS>(squares, Sum{}));
    const float shrink = smaller(epsilon / larger(distance, FLT_MIN), 1.0f);

    for_each_pack([&](int64_t i) {
        auto x = load<WIDTH>(x_adv + i);
        const auto g = load<WIDTH>(grad + i);
        const auto center = load<WIDTH>(x_nat + i);
        for (int k = 0; k < WIDTH; ++k) {
            const float delta = delta_of(x.values[k], g.values[k], center.values[k]);
            x.values[k] = clamp01(center.values[k] + shrink * delta);
        }
        store<WIDTH>(x_adv + i, x);
    });
}

template <typename Grad>
cudaError_t update(
    float* x_adv, const void* gradient, const float* x_nat, int64_t batch, int64_t per_sample, bool l2,
    float epsilon, float step_size, int64_t* counts, void* stream) {
    constexpr int WIDTH = ACCESS_BYTES / sizeof(Grad);
    const auto* grad = static_cast<const Grad*>(gradient);
    auto* totals = reinterpret_cast<Counts*>(counts);
    const bool aligned = is_aligned(x_adv) && is_aligned(grad) && is_aligned(x_nat);
    return with_flag(counts != nullptr, [&](auto counting) {
        constexpr bool COUNTING = decltype(counting)::value;
        if (l2) {
            return with_flag(aligned && per_sample % WIDTH == 0, [&](auto wide) {
                return launch(
                    pgd_update_l2<Grad, decltype(wide)::value, COUNTING>, dim3(batch), L2_THREADS, stream, x_adv,
                    grad, x_nat, per_sample, epsilon, step_size, totals);
            });
        }
        return with_flag(aligned, [&](auto wide) {
            const int64_t elements = batch * per_sample;
            const int64_t per_block = LINF_THREADS * (wide ? WIDTH : 1);
            const int64_t blocks = std::min<int64_t>((elements + per_block - 1) / per_block, LINF_MAX_BLOCKS);
            return launch(
                pgd_update_linf<Grad, decltype(wide)::value, COUNTING>, dim3(blocks), LINF_THREADS, stream, x_adv,
                grad, x_nat, elements, epsilon, step_size, totals);
        });
    });
}

}  // namespace
}  // namespace engine

// grad_dtype: 0 float32, 1 float16, 2 bfloat16. Returns 0 or a cudaError_t.
ENGINE_API int engine_cuda_pgd_update(
    float* x_adv, const void* grad, int grad_dtype, const float* x_nat, int64_t batch, int64_t per_sample, int l2,
    float epsilon, float step_size, int64_t* counts_or_null, void* stream) {
    if (batch == 0 || per_sample == 0) return cudaSuccess;
    decltype(&engine::update<float>) const updates[] = {
        engine::update<float>, engine::update<__half>, engine::update<__nv_bfloat16>};
    if (grad_dtype < 0 || grad_dtype > 2) return cudaErrorInvalidValue;
    return updates[grad_dtype](
        x_adv, grad, x_nat, batch, per_sample, l2, epsilon, step_size, counts_or_null, stream);
}
