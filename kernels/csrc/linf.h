// A step of an attack in an L-inf ball: what pgd_update and image_conv3x3 do with a gradient.
#pragma once

#include "numbers.h"

namespace engine {
namespace {

constexpr int64_t COUNTED = 4096;  // pixels between two additions to wide counters

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

// Step, projection and clamp of `size` pixels in place; counts what their gradient is.
template <typename Gradient>
void move_linf(
    const Gradient* grad, const float* x_nat, float* x_adv, int64_t size, float epsilon, float step_size,
    Counts& counts) {
    for (int64_t block = 0; block < size; block += COUNTED) {
        const int64_t stop = block + COUNTED < size ? block + COUNTED : size;
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
}

}  // namespace
}  // namespace engine
