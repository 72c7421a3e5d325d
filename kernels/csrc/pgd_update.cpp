// One step of a projected-gradient attack in one pass: kernels/pgd_update.py says what it computes.
#include "cpu.h"

#include <math.h>

#include "linf.h"

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int64_t GRAIN = 16384;  // pixels that are worth a thread
constexpr double TINY = 1.1754943508222875e-38;  // the smallest normal number of float32

// ---------------------------------------------------------------- L-inf: one flat pass

template <typename Gradient>
void step_linf(int64_t begin, int64_t end, void* context) {
    const UpdateArguments& call = *static_cast<const UpdateArguments*>(context);
    const Gradient* grad = static_cast<const Gradient*>(call.grad) + begin;
    Counts counts;
    move_linf(grad, call.x_nat + begin, call.x_adv + begin, end - begin, call.epsilon, call.step_size, counts);
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
