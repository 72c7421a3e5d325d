// One step of the FAB attack, image by image: kernels/fab_step.py says what it computes.
#include "cpu.h"

#include <math.h>

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int64_t GRAIN = 2048;        // pixels that are worth a thread
constexpr int NEWTON_STEPS = 50;       // as in kernels/reference.py
constexpr double NO_WEIGHT = 1e-8;     // likewise
constexpr double LEAST_NORM = 1e-8;

template <bool L2>
double weight_of(float gradient) {
    const double weight = fabs(static_cast<double>(gradient));
    return L2 && weight < NO_WEIGHT ? 0.0 : weight;
}

// The way of a pixel to the border against sign * gradient.
inline double room_of(double sign, float gradient, float pixel) {
    return sign * gradient > 0 ? pixel : 1.0 - pixel;
}

// How far a pixel moves, and, with its sign, its move.
template <bool L2>
double length_of(double multiplier, double weight, double room) {
    const double wanted = L2 ? multiplier * weight : weight > 0 ? multiplier : 0.0;
    return wanted < room ? wanted : room;
}

// The projection of a point onto the plane of points at distance 0 along a gradient.
template <bool L2>
struct Projection {
    const float *gradient, *point;
    int64_t size;
    double sign, multiplier;

    // distance: of the point from the plane, in units of the gradient.
    Projection(const float* gradient, const float* point, int64_t size, double distance)
        : gradient(gradient), point(point), size(size), sign(distance < 0 ? -1.0 : 1.0), multiplier(0) {
        const double wanted = fabs(distance);
        for (int step = 0; step < NEWTON_STEPS; ++step) {
            const double next = newton(wanted);
            if (!(next > multiplier)) break;
            multiplier = next;
        }
    }

    // The multiplier at which the tangent reaches what is wanted; 0 where every pixel is at the border.
    double newton(double wanted) const {
        const float *g = gradient, *t = point;
        const double s = sign, m = multiplier;
        double whole = 0, slope = 0;
#pragma omp simd reduction(+ : whole, slope)
        for (int64_t i = 0; i < size; ++i) {
            const double weight = weight_of<L2>(g[i]), room = room_of(s, g[i], t[i]);
            const double speed = L2 ? weight : 1.0;
            const bool is_full = m * speed >= room;
            whole += is_full ? weight * room : 0.0;
            slope += is_full ? 0.0 : weight * speed;
        }
        return slope > 0 ? (wanted - whole) / slope : 0.0;
    }

    double norm() const {
        const float *g = gradient, *t = point;
        const double s = sign, m = multiplier;
        double squares = 0, largest = 0;
#pragma omp simd reduction(+ : squares) reduction(max : largest)
        for (int64_t i = 0; i < size; ++i) {
            const double length = length_of<L2>(m, weight_of<L2>(g[i]), room_of(s, g[i], t[i]));
            squares += length * length;
            largest = largest < length ? length : largest;
        }
        const double found = L2 ? sqrt(squares) : largest;
        return found > LEAST_NORM ? found : LEAST_NORM;
    }
};

// Where eta times its move takes a pixel.
template <bool L2>
double moved(double sign, double multiplier, float gradient, float pixel, double eta) {
    const double length = length_of<L2>(multiplier, weight_of<L2>(gradient), room_of(sign, gradient, pixel));
    return pixel + (sign * gradient > 0 ? -eta : eta) * length;
}

template <bool L2>
void step(int64_t begin, int64_t end, void* context) {
    const FabArguments& call = *static_cast<const FabArguments*>(context);
    const int64_t size = call.per_sample;
    for (int64_t sample = begin; sample < end; ++sample) {
        const float *grad = call.grad + sample * size, *x_nat = call.x_nat + sample * size;
        float* x_adv = call.x_adv + sample * size;

        double to_nat = 0;
#pragma omp simd reduction(+ : to_nat)
        for (int64_t i = 0; i < size; ++i)
            to_nat += static_cast<double>(grad[i]) * (static_cast<double>(x_nat[i]) - x_adv[i]);
        const double distance = call.difference[sample], nat_distance = distance + to_nat;
        if (!(fabs(nat_distance) < INFINITY)) continue;  // and so it is wherever an entry is not finite

        const Projection<L2> own(grad, x_adv, size, distance), nat(grad, x_nat, size, nat_distance);
        const double norm = own.norm(), share = norm / (norm + nat.norm());
        const double alpha = share < call.alpha_max ? share : call.alpha_max, eta = call.eta;
        const double sign = own.sign, multiplier = own.multiplier;
        const double nat_sign = nat.sign, nat_multiplier = nat.multiplier;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            const double from_x = moved<L2>(sign, multiplier, grad[i], x_adv[i], eta);
            const double from_nat = moved<L2>(nat_sign, nat_multiplier, grad[i], x_nat[i], eta);
            const double pixel = (1.0 - alpha) * from_x + alpha * from_nat;
            x_adv[i] = static_cast<float>(pixel < 0.0 ? 0.0 : pixel > 1.0 ? 1.0 : pixel);
        }
    }
}

}  // namespace

void fab_step(const FabArguments& call) {
    if (call.batch == 0 || call.per_sample == 0) return;
    parallel_for(
        0, call.batch, 1 + GRAIN / call.per_sample, call.l2 ? step<true> : step<false>,
        const_cast<FabArguments*>(&call));
}

}  // namespace ENGINE_SET
}  // namespace engine
