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

enum Logits { S_ADV, S_NAT, T_AT_NAT, T_AT_ADV, T_ST_ADV, LOGITS };

enum Term { CE_NAT, CE_ADV, KL_SELF, KL_AT_NAT, KL_AT_ADV, KL_ST_ADV, TERMS };

// (B, C); strides in elements; data is null where no term reads them.
struct LogitsView {
    const void* data;
    int64_t dtype, row_stride, class_stride;
};

// One call of distill_loss; kernels/native.py packs it, so every field has 8 bytes.
struct LossArguments {
    int64_t batch, classes;
    LogitsView logits[LOGITS];
    const int64_t* labels;
    int64_t label_stride;
    const float* sample_weights;  // contiguous, or null
    double weights[TERMS][2];     // (a, b) of each term
    double tau, tau_self, beta, label_smoothing;
    int64_t detach_self;
    float *loss, *alpha, *terms, *per_sample;  // (), (B,), (6,), (B,)
    float *grad_adv, *grad_nat;                // (B, C) contiguous, or null
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

#define ENGINE_DECLARE(SET)                    \
    namespace SET {                            \
    int distill_loss(const LossArguments&);    \
    void pgd_update(const UpdateArguments&);   \
    int crop_flip(const CropArguments&);       \
    void random_start(const StartArguments&); \
    }

ENGINE_DECLARE(generic)
ENGINE_DECLARE(avx2)
ENGINE_DECLARE(avx512)
#undef ENGINE_DECLARE

}  // namespace engine
