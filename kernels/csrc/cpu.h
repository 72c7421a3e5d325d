// The CPU's kernels, which are compiled once for each instruction set, each time in a namespace of its own.
//
// Those files take nothing from the C++ library and give their own functions internal linkage: where several files
// hold one inline function the linker keeps any of them, and an old processor cannot run the one in AVX-512.
#pragma once

#include <cstdint>

namespace engine {

// torch_parallel_for of libtorch: calls body for parts of [begin, end) of at least `grain`, on torch's threads.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
extern ParallelFor parallel_for;

enum Status : int { OK = 0, OUT_OF_RANGE = 1, OUT_OF_MEMORY = 2 };

enum DType : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

enum Kind : int64_t { CE = 0, KL = 1, MARGIN = 2, KL_LIVE = 3 };  // KINDS of kernels/contract.py

// (B, C); strides in elements. gradient: (B, C) contiguous, or null where it is not wanted.
struct LogitsView {
    const void* data;
    int64_t dtype, row_stride, class_stride;
    float* gradient;
};

// student, target: numbers of logits; -1: the labels. factor: number of a column; -1: none.
struct Term {
    int64_t kind, student, target, detach, factor;
    double a, b, temperature;
};

// One call of distill_loss; kernels/native.py packs it, so every field has 8 bytes. Its logits lie behind it.
struct LossArguments {
    int64_t batch, classes, num_logits, num_terms, trust;  // trust: number of logits, or -1
    double beta, label_smoothing;
    const Term* terms;
    const int64_t* labels;
    int64_t label_stride;
    const float *sample_weights, *factors;  // (B,), (B, num_factors) contiguous, or null
    int64_t num_factors;
    float *loss, *alpha, *means, *per_sample;  // (), (B,), (num_terms,), (B,)

    const LogitsView* logits() const { return reinterpret_cast<const LogitsView*>(this + 1); }
};

// One call of crop_flip.
struct CropArguments {
    float* x;               // (B, H, W, C)
    int64_t* labels_out;    // (B,)
    const uint8_t* images;  // (N, H, W, C)
    const int64_t* labels;  // (N,)
    const int64_t* sample;  // (B,)
    const int64_t* index;   // (B,), of each sample's image and label
    int64_t batch, height, width, channels;
    uint64_t seed;
    uint32_t epoch;
    int padding;
    bool flip, augment;
};

// One call of pgd_update.
struct UpdateArguments {
    float* x_adv;
    const void* grad;
    int64_t grad_dtype;
    const float* x_nat;
    int64_t batch, per_sample;
    bool l2;
    float epsilon, step_size;
    int64_t* counts;  // of zero and of non-finite entries, or null
};

// One call of fab_step.
struct FabArguments {
    float* x_adv;
    const float *x_nat, *grad;
    const float* difference;  // (B,)
    int64_t batch, per_sample;
    bool l2;
    double alpha_max, eta;
};

// One call of random_start: uniform in an L-inf ball.
struct StartArguments {
    float* noise;           // (B, C, pixels), or (B, pixels, C) where channels are last
    const int64_t* sample;  // (B,)
    int64_t batch, channels, pixels;
    bool channels_last;
    float epsilon;
    uint64_t seed;
    uint32_t counter;
};

// One call of conv3x3; kernels/native.py packs it, so every field has 8 bytes.
struct ConvArguments {
    const float* images;                                        // (B, H, W, channels in)
    const float* weight;                                        // with the strides below, in elements
    int64_t out_stride, in_stride, row_stride, column_stride;
    int64_t flip;                                               // the kernel's rows and columns are in reverse
    const float* bias;                                          // (channels out,), or null
    float* transformed;                                         // ((tile + 2)^2, channels out, channels in)
    float* result;                                              // (B, H, W, channels out)
    int64_t batch, height, width, in, out;                      // channels: multiples of 16
    int64_t tile;                                               // height and width of a tile: 2 or 4
    int64_t threads;                                            // over which the work is spread
    int64_t is_transformed;                                     // an earlier call has written `transformed`
};

// One forward call of batch_norm, of maps (rows, channels) in one format, rows the pixels of all images.
struct NormArguments {
    const void *x, *residual;  // residual: or null
    const float *weight, *bias;
    float *running_mean, *running_var;  // (channels,), or null where they stay
    void* y;
    float* statistics;  // (2, channels): mean, 1 / sqrt(var + eps)
    int64_t dtype, rows, channels;
    double momentum, eps;
    bool relu;
};

// One backward call of batch_norm. y: null where it had no residual, and its sign is computed from x.
struct NormGradientArguments {
    const void *grad, *x, *y;
    const float *weight, *bias, *statistics;
    void *grad_x, *grad_residual;  // grad_residual: where y is given, else null
    float* grad_parameters;        // (2, channels): of weight and bias
    int64_t dtype, rows, channels;
    bool relu;
};

// One forward call of image_conv3x3. weight: (channels, 3, 3, RGB).
struct ImageConvArguments {
    const float *images, *weight;    // images: (B, H, W, RGB)
    const float *bias, *mean, *std;  // (channels,), (RGB,), (RGB,), or null
    void* y;                         // (B, H, W, channels)
    int64_t dtype, batch, height, width, channels;
};

// One backward call of image_conv3x3, or where of_images is null an attack's step by that gradient.
struct ImageGradientArguments {
    const void* grad;  // (B, H, W, channels)
    const float *weight, *std;
    float* of_images;  // (B, H, W, RGB)
    float* x_adv;
    const float* x_nat;
    float epsilon, step_size;
    int64_t* counts;  // of zero and of non-finite entries, or null
    int64_t dtype, batch, height, width, channels;
};

#define ENGINE_DECLARE(SET)                                    \
    namespace SET {                                            \
    int distill_loss(const LossArguments&);                    \
    void pgd_update(const UpdateArguments&);                   \
    void fab_step(const FabArguments&);                        \
    int crop_flip(const CropArguments&);                       \
    void random_start(const StartArguments&);                  \
    int conv3x3(const ConvArguments&);                         \
    int batch_norm(const NormArguments&);                      \
    int batch_norm_backward(const NormGradientArguments&);     \
    int image_conv3x3(const ImageConvArguments&);              \
    int image_conv3x3_backward(const ImageGradientArguments&); \
    }

ENGINE_DECLARE(generic)
ENGINE_DECLARE(avx2)
ENGINE_DECLARE(avx512)
#undef ENGINE_DECLARE

}  // namespace engine
