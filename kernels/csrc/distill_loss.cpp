// The loss of every method and its gradients, row by row: docs/loss.md has the formulas.
//
// A row's logits are brought into float32 and padded to whole vectors; all that follows are loops over such rows.
#include "cpu.h"

#include <math.h>
#include <stdlib.h>

#include "numbers.h"

namespace engine {
namespace ENGINE_SET {
namespace {

constexpr int LANES = 16;                          // floats of the widest vector
constexpr int64_t GRAIN = 1024;                    // classes, of several rows together, that are worth a thread
constexpr double LOWEST = -3.4028234663852886e38;  // of all float32 numbers

// Division by a number as multiplication, without its rounding error: 1 / number = high + low.
struct Reciprocal {
    float high, low;

    float operator()(float dividend) const { return dividend * high + dividend * low; }
};

Reciprocal reciprocal(double number) {
    const float high = static_cast<float>(1 / number);
    return {high, static_cast<float>(1 / number - high)};
}

// A softmax, shared by terms: p_c = exps[c] * inverse_sum and log p_c = (logits[c] - maximum) / temperature - log_sum.
struct Softmax {
    int64_t source;
    double temperature;
    Reciprocal divide;  // by the temperature
    const float* logits;
    float* exps;
    float maximum, inverse_sum;
    double sum, log_sum, log_inverse_sum;  // the last of the rounded number, by which p_c is made
};

// The softmaxes that a call needs, the same for all of its rows: numbers of those of each term, -1 where it has none.
struct Plan {
    static constexpr int PER_TERM = 3;

    int count = 0, trust = -1, gradients = 0;
    Softmax* softmaxes;  // room for PER_TERM of each term, and the trust's
    int *student, *target, *target_at_1;
    int* gradient;  // by logits: number of their gradient; those that nobody wants share the last one

    // memory: `bytes` of it.
    Plan(const LossArguments& call, void* memory)
        : softmaxes(static_cast<Softmax*>(memory)),
          student(reinterpret_cast<int*>(softmaxes + PER_TERM * call.num_terms + 1)),
          target(student + call.num_terms),
          target_at_1(target + call.num_terms),
          gradient(target_at_1 + call.num_terms) {
        for (int64_t k = 0; k < call.num_terms; ++k) {
            const Term& term = call.terms[k];
            student[k] = index(term.student, term.temperature);
            target[k] = term.target < 0 ? -1 : index(term.target, term.temperature);
            target_at_1[k] = term.kind == KL_LIVE ? index(term.target, 1) : -1;
        }
        if (call.trust >= 0) trust = index(call.trust, 1);
        for (int64_t i = 0; i < call.num_logits; ++i)
            if (call.logits()[i].gradient) gradient[i] = gradients++;
        for (int64_t i = 0; i < call.num_logits; ++i)
            if (!call.logits()[i].gradient) gradient[i] = gradients;
    }

    static size_t bytes(const LossArguments& call) {
        const size_t integers = PER_TERM * call.num_terms + call.num_logits;
        return sizeof(Softmax) * (PER_TERM * call.num_terms + 1) + sizeof(int) * integers;
    }

    int index(int64_t source, double temperature) {
        for (int k = 0; k < count; ++k)
            if (softmaxes[k].source == source && softmaxes[k].temperature == temperature) return k;
        softmaxes[count].source = source;
        softmaxes[count].temperature = temperature;
        softmaxes[count].divide = reciprocal(temperature);
        return count++;
    }
};

struct Call {
    const LossArguments& arguments;
    const Plan plan;
    double* rows;  // (B, num_terms + 1): the terms and the loss of each sample
    int status;
};

// ---------------------------------------------------------------- loops over a padded row

template <typename T>
void load(const T* from, int64_t stride, int classes, float* to) {
    if (stride == 1) {
#pragma omp simd
        for (int c = 0; c < classes; ++c) to[c] = to_float(from[c]);
    } else {
        for (int c = 0; c < classes; ++c) to[c] = to_float(from[c * stride]);
    }
}

void load_row(const LogitsView& view, int64_t row, int classes, int padded, float* to) {
    const int64_t offset = row * view.row_stride, stride = view.class_stride;
    switch (view.dtype) {
        case FLOAT32: load(static_cast<const float*>(view.data) + offset, stride, classes, to); break;
        case FLOAT16: load(static_cast<const Float16*>(view.data) + offset, stride, classes, to); break;
        case BFLOAT16: load(static_cast<const BFloat16*>(view.data) + offset, stride, classes, to); break;
    }
    for (int c = classes; c < padded; ++c) to[c] = to[0];  // which is no greater than the maximum
}

// As integers, whose maximum compilers turn into vector instructions, and a NaN is the largest.
float maximum_of(const float* row, int padded) {
    int32_t highest = INT32_MIN;
    for (int c = 0; c < padded; ++c) {
        const int32_t place = place_of(static_cast<int32_t>(bits_of(row[c])));
        highest = place > highest ? place : highest;
    }
    return float_of(static_cast<uint32_t>(place_of(highest)));
}

// Sums in double: one in float of many numbers would drop the small ones.
double sum_of_lanes(const double (&lanes)[8]) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

double sum_of(const float* row, int padded) {
    double lanes[8] = {};
    for (int c = 0; c < padded; c += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += row[c + lane];
    return sum_of_lanes(lanes);
}

double dot(const float* a, const float* b, int padded) {
    double lanes[8] = {};
    for (int c = 0; c < padded; c += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(a[c + lane]) * b[c + lane];
    return sum_of_lanes(lanes);
}

void normalise(Softmax& softmax, int classes, int padded) {
    const Reciprocal divide = softmax.divide;
    const float lowest = static_cast<float>(-100 * softmax.temperature);  // e^-100 = 0; finite: -inf * 0 is NaN
    const float *logits = softmax.logits, maximum = softmax.maximum;
    float* exps = softmax.exps;
#pragma omp simd
    for (int c = 0; c < padded; ++c) {
        const float z = logits[c] - maximum, e = exponential(divide(z < lowest ? lowest : z));
        exps[c] = c < classes ? e : 0.0f;
    }
    const double sum = sum_of(exps, padded);
    softmax.sum = sum;
    softmax.inverse_sum = static_cast<float>(1 / sum);
    softmax.log_sum = log(sum);
    softmax.log_inverse_sum = (softmax.inverse_sum * sum - 1) - softmax.log_sum;  // log(1 + x) = x for a tiny x
}

// sum_c p_c (log p_c - log q_c), its summands into `values` and log p - log q into `difference`.
// coefficient * (q - p) is added to grad_q.
double divergence(
    const Softmax& p, const Softmax& q, float coefficient, int padded, float* values, float* difference,
    float* grad_q) {
    // Close logits differ exactly. Where a shift lies between those of p and of q, it is taken out of each before.
    const bool near = fabsf(p.maximum - q.maximum) < 0.25f;
    const float shift_p = near ? 0 : p.maximum, shift_q = near ? 0 : q.maximum;
    const float shift = near ? p.maximum - q.maximum : 0;
    const float constant = static_cast<float>(q.log_inverse_sum - p.log_inverse_sum);
    const Reciprocal divide = p.divide;
    const float *logits_p = p.logits, *logits_q = q.logits, *exps_p = p.exps, *exps_q = q.exps;
    const float inverse_p = p.inverse_sum, inverse_q = q.inverse_sum;
#pragma omp simd
    for (int c = 0; c < padded; ++c) {
        const float d = divide((logits_p[c] - shift_p) - (logits_q[c] - shift_q) - shift) - constant;
        const float p_c = exps_p[c] * inverse_p, q_c = exps_q[c] * inverse_q;
        // As p and q have the same sum, sum p d = sum p phi(d) with phi(d) = d - 1 + e^-d = d - (p - q) / p.
        // It is never negative: nothing cancels. Near 0 it is d^2 times a polynomial (minimax fit).
        float phi = 2.484167998773046e-5f;
        phi = phi * d - 1.9961956422775984e-4f;
        phi = phi * d + 1.3889040565118194e-3f;
        phi = phi * d - 8.333182893693447e-3f;
        phi = phi * d + 4.16666641831398e-2f;
        phi = phi * d - 0.1666666716337204f;
        phi = (phi * d + 0.5f) * (d * d);
        const bool small = fabsf(d) < 0.5f;
        const float p_minus_q = small ? p_c * (d - phi) : p_c - q_c;
        values[c] = small ? p_c * phi : p_c * d - p_minus_q;
        difference[c] = d;
        grad_q[c] -= coefficient * p_minus_q;
    }
    return sum_of(values, padded);
}

// The gradient of a divergence to its target's logits: coefficient * p (d - <p, d>) added to grad_p.
void add_target_gradient(const Softmax& p, const float* difference, float coefficient, int padded, float* grad_p) {
    // Where p is nearly one-hot d and <p, d> nearly cancel: so the mean is made of these very d, in double.
    const double mean = dot(p.exps, difference, padded) / p.sum;
    const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
    const float *exps = p.exps, inverse_sum = p.inverse_sum;
#pragma omp simd
    for (int c = 0; c < padded; ++c)
        grad_p[c] += coefficient * (exps[c] * inverse_sum) * ((difference[c] - high) - low);
}

void add_softmax(const Softmax& p, float spread, float coefficient, int padded, float* grad) {
    const float *exps = p.exps, inverse_sum = p.inverse_sum;
#pragma omp simd
    for (int c = 0; c < padded; ++c) grad[c] += coefficient * (exps[c] * inverse_sum - spread);
}

// -sum_c y_c log p_c with y = (1 - smoothing) onehot + smoothing / C; coefficient * (p - y) is added to grad.
double cross_entropy(
    const Softmax& p, int64_t label, double smoothing, double coefficient, int classes, int padded, float* grad) {
    const double spread = smoothing / classes, p_minus_y = p.exps[label] / p.sum - (1 - smoothing) - spread;
    const double at_label = grad[label] + coefficient * p_minus_y;
    add_softmax(p, static_cast<float>(spread), static_cast<float>(coefficient), padded, grad);
    grad[label] = static_cast<float>(at_label);

    const double below = static_cast<double>(p.maximum) - p.logits[label];
    if (smoothing == 0) return below + p.log_sum;
    const double padding = static_cast<double>(p.logits[0]) * (padded - classes);
    const double mean = (sum_of(p.logits, padded) - padding) / classes;
    return (1 - smoothing) * below + smoothing * (p.maximum - mean) + p.log_sum;
}

// -log(1.0001 - max_{c != y} p_c + 1e-12); coefficient * its gradient is added to grad. Equal maxima share it.
double margin(const Softmax& p, int64_t label, double coefficient, int classes, int padded, float* grad) {
    float highest = -INFINITY;
    int count = 0;
    for (int c = 0; c < classes; ++c) {
        const float z = p.logits[c];
        if (c == label || z < highest) continue;
        count = z == highest ? count + 1 : 1;
        highest = z;
    }
    double share = NAN;
    for (int c = 0; c < classes; ++c)
        if (c != label && p.logits[c] == highest) share = p.exps[c] / p.sum;
    const double room = 1.0001 - share + 1e-12, slope = coefficient * share / room;
    add_softmax(p, 0, static_cast<float>(-slope), padded, grad);
    for (int c = 0; c < classes; ++c)
        if (c != label && p.logits[c] == highest) grad[c] += static_cast<float>(slope / count);
    return -log(room);
}

// (1.0000001 - softmax(t)_y) sum_c p_c (log p_c - log(q_c + 1e-12)), t the logits of p, of which `at_1` is the softmax
// at temperature 1; coefficient * its gradients is added to grad_q, and to grad_p unless that is null.
double live_divergence(
    const Softmax& p, const Softmax& q, const Softmax& at_1, int64_t label, double coefficient, int classes,
    int padded, float* difference, float* grad_q, float* grad_p) {
    double divergence = 0, kept = 0;
    for (int c = 0; c < classes; ++c) {
        const double p_c = p.exps[c] / p.sum, q_c = q.exps[c] / q.sum;
        const double log_p = (static_cast<double>(p.logits[c]) - p.maximum) / p.temperature - p.log_sum;
        const double d = log_p - log(q_c + 1e-12);
        difference[c] = static_cast<float>(d);
        divergence += p_c * d;
        kept += p_c * (q_c / (q_c + 1e-12));
    }
    for (int c = classes; c < padded; ++c) difference[c] = 0;
    const double at_label = at_1.exps[label] / at_1.sum, live = 1.0000001 - at_label;
    const double slope = coefficient * live / p.temperature;
    for (int c = 0; c < classes; ++c) {
        const double p_c = p.exps[c] / p.sum, q_c = q.exps[c] / q.sum;
        grad_q[c] += static_cast<float>(slope * (q_c * kept - p_c * (q_c / (q_c + 1e-12))));
    }
    if (grad_p) {
        add_target_gradient(p, difference, static_cast<float>(slope), padded, grad_p);
        const double of_label = coefficient * divergence * at_label;
        add_softmax(at_1, 0, static_cast<float>(of_label), padded, grad_p);
        grad_p[label] -= static_cast<float>(of_label);
    }
    return live * divergence;
}

// ---------------------------------------------------------------- one sample, a range of samples, the batch

// Memory of a thread, for one row at a time.
struct Workspace {
    const int classes, padded;
    float *logits, *gradients, *maxima, *values, *difference;
    Softmax* softmaxes;

    Workspace(const Call& call, int padded, void* memory)
        : classes(static_cast<int>(call.arguments.classes)), padded(padded), logits(static_cast<float*>(memory)) {
        const int64_t count = call.arguments.num_logits;
        gradients = logits + count * padded;
        values = gradients + (call.plan.gradients + 1) * padded;
        difference = values + padded;
        float* exps = difference + padded;
        maxima = exps + call.plan.count * padded;
        softmaxes = reinterpret_cast<Softmax*>(maxima + (count + LANES - 1) / LANES * LANES);
        for (int k = 0; k < call.plan.count; ++k) {
            softmaxes[k] = call.plan.softmaxes[k];
            softmaxes[k].logits = logits + softmaxes[k].source * padded;
            softmaxes[k].exps = exps + k * padded;
        }
        for (int c = 0; c < padded; ++c) gradients[call.plan.gradients * padded + c] = 0;
    }

    static size_t bytes(const Call& call, int padded) {
        const int64_t count = call.arguments.num_logits, softmaxes = call.plan.count;
        const size_t rows = count + call.plan.gradients + 3 + softmaxes;
        const size_t floats = rows * padded + (count + LANES - 1) / LANES * LANES;
        const size_t unit = sizeof(float) * LANES, all = sizeof(float) * floats + sizeof(Softmax) * softmaxes;
        return (all + unit - 1) / unit * unit;
    }
};

double compute_term(const Call& call, int64_t k, int64_t label, double scale, Workspace& space) {
    const Term& term = call.arguments.terms[k];
    const int classes = space.classes, padded = space.padded;
    const Softmax& student = space.softmaxes[call.plan.student[k]];
    float* gradient = space.gradients + call.plan.gradient[term.student] * padded;
    switch (term.kind) {
        case CE:
            return cross_entropy(
                student, label, call.arguments.label_smoothing, scale, classes, padded, gradient);
        case MARGIN: return margin(student, label, scale, classes, padded, gradient);
    }
    const Softmax& target = space.softmaxes[call.plan.target[k]];
    const bool wanted = !term.detach && call.arguments.logits()[term.target].gradient;
    float* target_gradient = wanted ? space.gradients + call.plan.gradient[term.target] * padded : nullptr;
    if (term.kind == KL_LIVE)
        return live_divergence(
            target, student, space.softmaxes[call.plan.target_at_1[k]], label, scale, classes, padded,
            space.difference, gradient, target_gradient);
    const float coefficient = static_cast<float>(scale / term.temperature);
    const double value =
        divergence(target, student, coefficient, padded, space.values, space.difference, gradient);
    if (wanted) add_target_gradient(target, space.difference, coefficient, padded, target_gradient);
    return value;
}

void compute_row(const Call& call, int64_t row, Workspace& space) {
    const LossArguments& given = call.arguments;
    const LogitsView* logits = given.logits();
    const int classes = space.classes, padded = space.padded;
    const int64_t label = given.labels[row * given.label_stride], count = given.num_terms;

    for (int64_t i = 0; i < given.num_logits; ++i) {
        load_row(logits[i], row, classes, padded, space.logits + i * padded);
        space.maxima[i] = maximum_of(space.logits + i * padded, padded);
    }
    for (int k = 0; k < call.plan.count; ++k) {
        space.softmaxes[k].maximum = space.maxima[space.softmaxes[k].source];
        normalise(space.softmaxes[k], classes, padded);
    }

    double alpha = 1;
    if (call.plan.trust >= 0) {
        const Softmax& p = space.softmaxes[call.plan.trust];
        const double log_p = static_cast<double>(p.logits[label]) - p.maximum - p.log_sum;
        // A probability that underflows to 0 gives alpha 1 at beta = 0, not 0 * -inf. NaN stays.
        alpha = exp(given.beta * (log_p < LOWEST ? LOWEST : log_p));
    }

    const double share = given.sample_weights ? given.sample_weights[row] : 1;
    double* values = call.rows + row * (count + 1);
    double loss = 0;
    for (int c = 0; c < call.plan.gradients * padded; ++c) space.gradients[c] = 0;
    for (int64_t k = 0; k < count; ++k) {
        const Term& term = given.terms[k];
        double weight = term.b != 0 ? term.a + term.b * alpha : term.a;
        if (term.factor >= 0) weight *= given.factors[row * given.num_factors + term.factor];
        values[k] = compute_term(call, k, label, weight * share / given.batch, space);
        loss += weight * values[k];
    }
    values[count] = share * loss;
    given.alpha[row] = static_cast<float>(alpha);
    given.per_sample[row] = static_cast<float>(values[count]);
    for (int64_t i = 0; i < given.num_logits; ++i)
        if (logits[i].gradient)
            memcpy(
                logits[i].gradient + row * classes, space.gradients + call.plan.gradient[i] * padded,
                sizeof(float) * classes);
}

void compute_rows(int64_t begin, int64_t end, void* context) {
    Call& call = *static_cast<Call*>(context);
    const int padded = static_cast<int>((call.arguments.classes + LANES - 1) / LANES * LANES);
    void* memory = aligned_alloc(sizeof(float) * LANES, Workspace::bytes(call, padded));
    if (!memory) {
        __atomic_store_n(&call.status, OUT_OF_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    Workspace space(call, padded, memory);
    for (int64_t row = begin; row < end; ++row) compute_row(call, row, space);
    free(memory);
}

}  // namespace

int distill_loss(const LossArguments& given) {
    const int64_t count = given.num_terms;
    double* rows = static_cast<double*>(malloc(sizeof(double) * (given.batch + 1) * (count + 1)));
    void* plan = malloc(Plan::bytes(given));
    if (!rows || !plan) {
        free(rows), free(plan);
        return OUT_OF_MEMORY;
    }
    Call call{given, Plan(given, plan), rows, OK};
    if (given.batch) parallel_for(0, given.batch, 1 + GRAIN / given.classes, compute_rows, &call);

    // In the order of the batch, whatever thread made which row: the same bits for any number of threads.
    double* sums = rows + given.batch * (count + 1);
    for (int64_t k = 0; k <= count; ++k) sums[k] = 0;
    for (int64_t row = 0; row < given.batch; ++row)
        for (int64_t k = 0; k <= count; ++k) sums[k] += rows[row * (count + 1) + k];
    const double samples = given.batch ? static_cast<double>(given.batch) : 1;
    for (int64_t k = 0; k < count; ++k) given.means[k] = static_cast<float>(sums[k] / samples);
    *given.loss = static_cast<float>(sums[count] / samples);
    free(rows), free(plan);
    return call.status;
}

}  // namespace ENGINE_SET
}  // namespace engine
