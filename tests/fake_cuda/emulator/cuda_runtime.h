// As much of CUDA C++ as this project's kernels use, for a C++ compiler: kernels run on the CPU, one block after
// another. The threads of a block are fibers that change places at barriers alone, the first runnable one (or, on
// demand, the last) as far as it gets: where a barrier is missing, some warp then runs far ahead of the others.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorLaunchTimeout = 702,
    cudaErrorAssert = 710
};
using cudaStream_t = struct Stream*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 64 << 10;

inline bool last_first = false;
inline bool assertion_failed = false;
inline int launches = 0;

struct Barrier {
    unsigned members, arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    const Barrier* barrier = nullptr;  // that it waits at, and since when
    unsigned generation = 0;
    bool finished = false;

    bool runnable() const { return !finished && (!barrier || barrier->generation != generation); }
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warps;
inline Barrier block;
inline std::function<void()> kernel;

inline void run_fiber() {
    kernel();
    fibers[threadIdx.x].finished = true;
    setcontext(&scheduler);
}

inline void arrive(Barrier& barrier) {
    Fiber& self = fibers[threadIdx.x];
    self.barrier = &barrier;
    self.generation = barrier.generation;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    swapcontext(&self.context, &scheduler);
}

// Whether every thread came to its end, and none was left at a barrier.
inline bool run_block() {
    const unsigned threads = blockDim.x;
    fibers.resize(threads);
    block = {threads};
    warps.assign(threads / WARP, {WARP});
    for (Fiber& fiber : fibers) {
        fiber.finished = false;
        fiber.barrier = nullptr;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber.context, run_fiber, 0);
    }
    const auto thread_of = [&](unsigned rank) { return last_first ? threads - 1 - rank : rank; };
    for (unsigned first = 0;;) {
        while (first < threads && fibers[thread_of(first)].finished) ++first;
        if (first == threads) return true;
        unsigned rank = first;
        while (rank < threads && !fibers[thread_of(rank)].runnable()) ++rank;
        if (rank == threads) return false;
        threadIdx = dim3(thread_of(rank), 0, 0);
        swapcontext(&scheduler, &fibers[threadIdx.x].context);
    }
}

}  // namespace emulator

// The device would report a failed assertion, or hang, only after the launch.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    ++emulator::launches;
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    if (!gridDim.x || !gridDim.y || blockDim.x % emulator::WARP) return cudaErrorInvalidValue;
    emulator::kernel = [=] { kernel(static_cast<Parameters>(arguments)...); };
    emulator::assertion_failed = false;
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
            if (!emulator::run_block()) return cudaErrorLaunchTimeout;
        }
    }
    return emulator::assertion_failed ? cudaErrorAssert : cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }

inline void __syncthreads() { emulator::arrive(emulator::block); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    static T lanes[1024];
    emulator::Barrier& warp = emulator::warps[threadIdx.x / emulator::WARP];
    const unsigned self = threadIdx.x;
    lanes[self] = value;
    emulator::arrive(warp);
    const T other = lanes[self ^ distance];
    emulator::arrive(warp);
    return other;
}

template <typename T>
void atomicAdd(T* to, T value) {
    *to += value;
}
