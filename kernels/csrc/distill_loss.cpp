// The loss of every method and both of its gradients, row by row: docs/loss.md has the formulas.
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

constexpr bool is_divergence(int term) { return term >= KL_SELF; }

// Logits of the target of each divergence, and of the only softmax of a cross-entropy.
constexpr Logits TARGET[TERMS] = {S_NAT, S_ADV, S_NAT, T_AT_NAT, T_AT_ADV, T_ST_ADV};

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
    Logits source;
    double temperature;
    Reciprocal divide;  // by the temperature
    const float* logits;
    float* exps;
    float maximum, inverse_sum;
    double sum, log_sum, log_inverse_sum;  // the last of the rounded number, by which p_c is made
};

// S(x~) at 1, tau and tau_self, S(x) at 1 and tau_self, T_at(x~) at 1 and tau, T_at(x) and T_st(x~) at tau.
constexpr int MAX_SOFTMAXES = 9;

// The softmaxes that a call needs, the same for all of its rows.
struct Plan {
    int count = 0;
    Softmax softmaxes[MAX_SOFTMAXES];
    bool reads[LOGITS] = {}, active[TERMS];
    int target[TERMS], student[TERMS];
    int trust = -1;

    explicit Plan(const LossArguments& call) {
        for (int term = 0; term < TERMS; ++term) {
            active[term] = call.weights[term][0] != 0 || call.weights[term][1] != 0;
            if (!active[term]) continue;
            const double temperature = !is_divergence(term) ? 1 : term == KL_SELF ? call.tau_self : call.tau;
            target[term] = index(TARGET[term], temperature);
            if (is_divergence(term)) student[term] = index(S_ADV, temperature);
        }
        if (call.logits[T_AT_ADV].data) trust = index(T_AT_ADV, 1);
    }

    int index(Logits source, double temperature) {
        for (int k = 0; k < count; ++k)
            if (softmaxes[k].source == source && softmaxes[k].temperature == temperature) return k;
        reads[source] = true;
        softmaxes[count].source = source;
        softmaxes[count].temperature = temperature;
        softmaxes[count].divide = reciprocal(temperature);
        return count++;
    }
};

struct Call {
    const LossArguments& arguments;
    const Plan plan;
    double* rows;  // (B, TERMS + 1): the terms and the loss of each sample
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

// ---------------------------------------------------------------- one sample, a range of samples, the batch

// Memory of a thread, for one row at a time.
struct Workspace {
    const int classes, padded;
    float *logits[LOGITS], *grad_adv, *grad_nat, *values, *difference;
    Softmax softmaxes[MAX_SOFTMAXES];
    static constexpr int ROWS = LOGITS + 4 + MAX_SOFTMAXES;

    Workspace(const Call& call, int padded, float* memory)
        : classes(static_cast<int>(call.arguments.classes)), padded(padded) {
        float* unused = memory;
        const auto next = [&] { return (unused += padded) - padded; };
        for (float*& row : logits) row = next();
        grad_adv = next(), grad_nat = next(), values = next(), difference = next();
        for (int k = 0; k < call.plan.count; ++k) {
            softmaxes[k] = call.plan.softmaxes[k];
            softmaxes[k].logits = logits[softmaxes[k].source];
            softmaxes[k].exps = next();
        }
    }
};

void compute_row(const Call& call, int64_t row, Workspace& space) {
    const LossArguments& given = call.arguments;
    const Plan& plan = call.plan;
    const int classes = space.classes, padded = space.padded;
    const int64_t label = given.labels[row * given.label_stride];

    float maxima[LOGITS];
    for (int source = 0; source < LOGITS; ++source) {
        if (!plan.reads[source]) continue;
        load_row(given.logits[source], row, classes, padded, space.logits[source]);
        maxima[source] = maximum_of(space.logits[source], padded);
    }
    for (int k = 0; k < plan.count; ++k) {
        space.softmaxes[k].maximum = maxima[space.softmaxes[k].source];
        normalise(space.softmaxes[k], classes, padded);
    }

    double alpha = 1;
    if (plan.trust >= 0) {
        const Softmax& p = space.softmaxes[plan.trust];
        const double log_p = static_cast<double>(p.logits[label]) - p.maximum - p.log_sum;
        // A probability that underflows to 0 gives alpha 1 at beta = 0, not 0 * -inf. NaN stays.
        alpha = exp(given.beta * (log_p < LOWEST ? LOWEST : log_p));
    }

    const double share = given.sample_weights ? given.sample_weights[row] : 1;
    double* values = call.rows + row * (TERMS + 1);
    double loss = 0;
    for (int c = 0; c < padded; ++c) space.grad_adv[c] = space.grad_nat[c] = 0;
    for (int term = 0; term < TERMS; ++term) {
        values[term] = 0;
        if (!plan.active[term]) continue;
        const double a = given.weights[term][0], b = given.weights[term][1];
        const double weight = b != 0 ? a + b * alpha : a, per_batch = weight * share / given.batch;
        const Softmax& p = space.softmaxes[plan.target[term]];
        if (is_divergence(term)) {
            const float coefficient = static_cast<float>(per_batch / p.temperature);
            const Softmax& q = space.softmaxes[plan.student[term]];
            values[term] =
                divergence(p, q, coefficient, padded, space.values, space.difference, space.grad_adv);
            if (term == KL_SELF && !given.detach_self)
                add_target_gradient(p, space.difference, coefficient, padded, space.grad_nat);
        } else {
            values[term] = cross_entropy(
                p, label, given.label_smoothing, per_batch, classes, padded,
                term == CE_NAT ? space.grad_nat : space.grad_adv);
        }
        loss += weight * values[term];
    }
    values[TERMS] = share * loss;
    given.alpha[row] = static_cast<float>(alpha);
    given.per_sample[row] = static_cast<float>(values[TERMS]);
    const int64_t start = row * given.classes;
    if (given.grad_adv) memcpy(given.grad_adv + start, space.grad_adv, sizeof(float) * classes);
    if (given.grad_nat) memcpy(given.grad_nat + start, space.grad_nat, sizeof(float) * classes);
}

void compute_rows(int64_t begin, int64_t end, void* context) {
    Call& call = *static_cast<Call*>(context);
    const int padded = static_cast<int>((call.arguments.classes + LANES - 1) / LANES * LANES);
    void* memory = aligned_alloc(sizeof(float) * LANES, sizeof(float) * padded * Workspace::ROWS);
    if (!memory) {
        __atomic_store_n(&call.status, OUT_OF_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    Workspace space(call, padded, static_cast<float*>(memory));
    for (int64_t row = begin; row < end; ++row) compute_row(call, row, space);
    free(memory);
}

}  // namespace

int distill_loss(const LossArguments& given) {
    double* rows = static_cast<double*>(malloc(sizeof(double) * (given.batch + 1) * (TERMS + 1)));
    if (!rows) return OUT_OF_MEMORY;
    Call call{given, Plan(given), rows, OK};
    if (given.batch) parallel_for(0, given.batch, 1 + GRAIN / given.classes, compute_rows, &call);

    // In the order of the batch, whatever thread made which row: the same bits for any number of threads.
    double sums[TERMS + 1] = {};
    for (int64_t row = 0; row < given.batch; ++row)
        for (int k = 0; k <= TERMS; ++k) sums[k] += rows[row * (TERMS + 1) + k];
    const double count = given.batch ? static_cast<double>(given.batch) : 1;
    for (int term = 0; term < TERMS; ++term) given.terms[term] = static_cast<float>(sums[term] / count);
    *given.loss = static_cast<float>(sums[TERMS] / count);
    free(rows);
    return call.status;
}

}  // namespace ENGINE_SET
}  // namespace engine
