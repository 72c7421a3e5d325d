// The C entry points of the CPU's part, and the choice of the instruction set. kernels/native.py calls them.
#include <string.h>

#include "cpu.h"

namespace engine {
namespace {

int32_t serial_for(int64_t begin, int64_t end, int64_t, Body body, void* context) {
    body(begin, end, context);
    return 0;
}

struct InstructionSet {
    const char* name;
    bool (*is_supported)();
    int (*distill_loss)(const LossArguments&);
    void (*pgd_update)(const UpdateArguments&);
    void (*fab_step)(const FabArguments&);
    int (*crop_flip)(const CropArguments&);
    void (*random_start)(const StartArguments&);
    int (*conv3x3)(const ConvArguments&);
    int (*batch_norm)(const NormArguments&);
    int (*batch_norm_backward)(const NormGradientArguments&);
    int (*image_conv3x3)(const ImageConvArguments&);
    int (*image_conv3x3_backward)(const ImageGradientArguments&);
};

#ifdef ENGINE_X86_64
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

bool has_generic() { return true; }

// The best first.
constexpr InstructionSet SETS[] = {
#ifdef ENGINE_X86_64
    {"AVX-512", has_avx512, avx512::distill_loss, avx512::pgd_update, avx512::fab_step,
     avx512::crop_flip, avx512::random_start, avx512::conv3x3, avx512::batch_norm, avx512::batch_norm_backward,
     avx512::image_conv3x3, avx512::image_conv3x3_backward},
    {"AVX2", has_avx2, avx2::distill_loss, avx2::pgd_update, avx2::fab_step, avx2::crop_flip, avx2::random_start,
     avx2::conv3x3, avx2::batch_norm, avx2::batch_norm_backward, avx2::image_conv3x3, avx2::image_conv3x3_backward},
#endif
    {"generic", has_generic, generic::distill_loss, generic::pgd_update, generic::fab_step,
     generic::crop_flip, generic::random_start, generic::conv3x3, generic::batch_norm, generic::batch_norm_backward,
     generic::image_conv3x3, generic::image_conv3x3_backward},
};

// The set of that name, or the best one, that this processor has.
const InstructionSet* find(const char* name) {
#ifdef ENGINE_X86_64
    __builtin_cpu_init();
#endif
    for (const InstructionSet& set : SETS)
        if ((!name || !strcmp(set.name, name)) && set.is_supported()) return &set;
    return nullptr;
}

const InstructionSet* chosen = find(nullptr);

bool in_range(const int64_t* values, int64_t stride, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i)
        if (values[i * stride] < 0 || values[i * stride] >= limit) return false;
    return true;
}

}  // namespace

ParallelFor parallel_for = serial_for;

}  // namespace engine

#pragma GCC visibility push(default)
extern "C" {

using namespace engine;

// To be raised with every change of what kernels/native.py calls: a library of other sources is not called.
int engine_interface() { return 9; }

void engine_use_threads(ParallelFor torch_parallel_for) { parallel_for = torch_parallel_for; }

const char* engine_instruction_set() { return chosen->name; }

// Another set than the best, for tests and measurements. Returns 0 where this processor has it.
int engine_use_instruction_set(const char* name) {
    const InstructionSet* set = find(name);
    if (!set) return 1;
    chosen = set;
    return 0;
}

int engine_cpu_distill_loss(const LossArguments* call) {
    if (!in_range(call->labels, call->label_stride, call->batch, call->classes)) return OUT_OF_RANGE;
    return chosen->distill_loss(*call);
}

int engine_cpu_pgd_update(
    float* x_adv, const void* grad, int grad_dtype, const float* x_nat, int64_t batch, int64_t per_sample, int l2,
    float epsilon, float step_size, int64_t* counts) {
    chosen->pgd_update(
        {x_adv, grad, grad_dtype, x_nat, batch, per_sample, l2 != 0, epsilon, step_size, counts});
    return OK;
}

int engine_cpu_fab_step(
    float* x_adv, const float* x_nat, const float* grad, const float* difference, int64_t batch,
    int64_t per_sample, int l2, double alpha_max, double eta) {
    chosen->fab_step({x_adv, x_nat, grad, difference, batch, per_sample, l2 != 0, alpha_max, eta});
    return OK;
}

int engine_cpu_crop_flip(
    float* x, int64_t* labels_out, const uint8_t* images, const int64_t* labels, const int64_t* sample,
    const int64_t* index, int64_t batch, int64_t num_images, int height, int width, int channels, uint64_t seed,
    uint32_t epoch, int padding, int flip, int augment) {
    if (!index) index = sample;
    if (!in_range(index, 1, batch, num_images)) return OUT_OF_RANGE;
    return chosen->crop_flip(
        {x, labels_out, images, labels, sample, index, batch, height, width, channels, seed, epoch, padding,
         flip != 0, augment != 0});
}

int engine_cpu_random_start(
    float* noise, const int64_t* sample, int64_t batch, int64_t channels, int64_t pixels, int channels_last,
    float epsilon, uint64_t seed, uint32_t counter) {
    chosen->random_start({noise, sample, batch, channels, pixels, channels_last != 0, epsilon, seed, counter});
    return OK;
}

int engine_cpu_conv3x3(const ConvArguments* call) { return chosen->conv3x3(*call); }

int engine_cpu_batch_norm(
    const void* x, const void* residual, const float* weight, const float* bias, float* running_mean,
    float* running_var, void* y, float* statistics, int dtype, int64_t rows, int64_t channels, double momentum,
    double eps, int relu) {
    return chosen->batch_norm(
        {x, residual, weight, bias, running_mean, running_var, y, statistics, dtype, rows, channels, momentum,
         eps, relu != 0});
}

int engine_cpu_batch_norm_backward(
    const void* grad, const void* x, const void* y, const float* weight, const float* bias,
    const float* statistics, void* grad_x, void* grad_residual, float* grad_parameters, int dtype, int64_t rows,
    int64_t channels, int relu) {
    return chosen->batch_norm_backward(
        {grad, x, y, weight, bias, statistics, grad_x, grad_residual, grad_parameters, dtype, rows, channels,
         relu != 0});
}

int engine_cpu_image_conv3x3(
    const float* images, const float* weight, const float* bias, const float* mean, const float* std, void* y,
    int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels) {
    return chosen->image_conv3x3(
        {images, weight, bias, mean, std, y, dtype, batch, height, width, channels});
}

int engine_cpu_image_conv3x3_backward(
    const void* grad, const float* weight, const float* std, float* of_images, int dtype, int64_t batch,
    int64_t height, int64_t width, int64_t channels) {
    return chosen->image_conv3x3_backward(
        {grad, weight, std, of_images, nullptr, nullptr, 0, 0, nullptr, dtype, batch, height, width, channels});
}

int engine_cpu_image_conv3x3_update(
    const void* grad, const float* weight, const float* std, float* x_adv, const float* x_nat, float epsilon,
    float step_size, int64_t* counts, int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels) {
    return chosen->image_conv3x3_backward(
        {grad, weight, std, nullptr, x_adv, x_nat, epsilon, step_size, counts, dtype, batch, height, width,
         channels});
}

}  // extern "C"
#pragma GCC visibility pop
