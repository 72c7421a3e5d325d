// One step of a projected-gradient attack in one pass: kernels/pgd_update.py says what it computes.
#include "cpu.h"

#include <math.h>

#include "numbers.h"

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int64_t GRAIN = 16384;  // pixels that are worth a thread
constexpr int64_t BLOCK = 4096;   // pixels between two additions to wide counters
constexpr double TINY = 1.1754943508222875e-38;  // the smallest normal number of float32

// As torch.maximum and torch.minimum: NaN where either is NaN. Without || or |, for which GCC has no vector code.
template <typename T>
T maximum(T a, T b) {
    const T larger = a < b ? b : a;
    return b != b ? b : larger;
}
template <typename T>
T minimum(T a, T b) {
    const T smaller = a > b ? b : a;
    return b != b ? b : smaller;
}

// Zero and non-finite entries, told by their bits: no compiler flag can remove these tests.
struct Counts {
    int64_t zero = 0, not_finite = 0;

    void add_to(int64_t* totals) const {
        if (!totals) return;
        __atomic_fetch_add(&totals[0], zero, __ATOMIC_RELAXED);
        __atomic_fetch_add(&totals[1], not_finite, __ATOMIC_RELAXED);
    }
};

inline int is_zero(float value) { return (bits_of(value) & 0x7FFFFFFFu) == 0; }
inline int is_not_finite(float value) { return (bits_of(value) & 0x7FFFFFFFu) >= 0x7F800000u; }

// ---------------------------------------------------------------- L-inf: one flat pass

template <typename Gradient>
void step_linf(int64_t begin, int64_t end, void* context) {
    const UpdateArguments& call = *static_cast<const UpdateArguments*>(context);
    const Gradient* grad = static_cast<const Gradient*>(call.grad);
    const float *x_nat = call.x_nat, epsilon = call.epsilon, step_size = call.step_size;
    float* x_adv = call.x_adv;
    Counts counts;
    for (int64_t block = begin; block < end; block += BLOCK) {
        const int64_t stop = block + BLOCK < end ? block + BLOCK : end;
        int zero = 0, not_finite = 0;
#pragma omp simd reduction(+ : zero, not_finite)
        for (int64_t i = block; i < stop; ++i) {
            const float g = to_float(grad[i]);
            zero += is_zero(g);
            not_finite += is_not_finite(g);
            const float sign = (g > 0 ? 1.0f : 0.0f) - (g < 0 ? 1.0f : 0.0f);  // 0 for NaN, as torch.sign
            const float moved = x_adv[i] + step_size * sign;
            const float near = minimum(maximum(moved, x_nat[i] - epsilon), x_nat[i] + epsilon);
            x_adv[i] = minimum(maximum(near, 0.0f), 1.0f);
        }
        counts.zero += zero;
        counts.not_finite += not_finite;
    }
    counts.add_to(call.counts);
}

// ---------------------------------------------------------------- L2: sample by sample

// In double, where neither the squares of a tiny gradient nor those of a huge one leave the range.
template <typename Gradient>
void step_l2(int64_t begin, int64_t end, void* context) {
    const UpdateArguments& call = *static_cast<const UpdateArguments*>(context);
    Counts counts;
    for (int64_t sample = begin; sample < end; ++sample) {
        const int64_t start = sample * call.per_sample, size = call.per_sample;
        const Gradient* grad = static_cast<const Gradient*>(call.grad) + start;
        const float* x_nat = call.x_nat + start;
        float* x_adv = call.x_adv + start;

        double grad_squares = 0, delta_squares = 0;
        int64_t zero = 0, not_finite = 0;
#pragma omp simd reduction(+ : grad_squares, zero, not_finite)
        for (int64_t i = 0; i < size; ++i) {
            const float g = to_float(grad[i]);
            zero += is_zero(g);
            not_finite += is_not_finite(g);
            grad_squares += static_cast<double>(g) * g;
        }
        counts.zero += zero;
        counts.not_finite += not_finite;

        // A gradient of 0 moves nothing; one with infinite or NaN entries makes the sample NaN.
        const double norm = sqrt(grad_squares);
        const double step = not_finite ? NAN : norm > 0 ? call.step_size / norm : 0;
#pragma omp simd reduction(+ : delta_squares)
        for (int64_t i = 0; i < size; ++i) {
            const double delta = x_adv[i] + step * to_float(grad[i]) - x_nat[i];
            delta_squares += delta * delta;
        }

        // Delta once more: were it kept in x_adv, x_adv and x_nat could not be one tensor.
        const double shrink = minimum(call.epsilon / maximum(sqrt(delta_squares), TINY), 1.0);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const double delta = x_adv[i] + step * to_float(grad[i]) - x_nat[i];
            const float moved = static_cast<float>(x_nat[i] + shrink * delta);
            x_adv[i] = minimum(maximum(moved, 0.0f), 1.0f);
        }
    }
    counts.add_to(call.counts);
}

template <typename Gradient>
void update(const UpdateArguments& call) {
    void* context = const_cast<UpdateArguments*>(&call);
    if (call.l2) {
        parallel_for(0, call.batch, 1 + GRAIN / call.per_sample, step_l2<Gradient>, context);
    } else {
        parallel_for(0, call.batch * call.per_sample, GRAIN, step_linf<Gradient>, context);
    }
}

}  // namespace

void pgd_update(const UpdateArguments& call) {
    if (call.batch == 0 || call.per_sample == 0) return;
    switch (call.grad_dtype) {
        case FLOAT32: return update<float>(call);
        case FLOAT16: return update<Float16>(call);
        case BFLOAT16: return update<BFloat16>(call);
    }
}

}  // namespace ENGINE_SET
}  // namespace engine
