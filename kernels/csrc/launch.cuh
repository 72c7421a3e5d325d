// Shared by the CUDA kernels: wide accesses, and a launch that reports its own error alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define ENGINE_API extern "C" __attribute__((visibility("default")))

namespace engine {

// The widest access that every GPU has.
constexpr int ACCESS_BYTES = 16;

// Neighbours in memory, which one or several accesses move at once.
template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH < ACCESS_BYTES ? sizeof(T) * WIDTH : ACCESS_BYTES) Pack {
    T values[WIDTH];
};

template <int WIDTH, typename T>
__device__ Pack<T, WIDTH> load(const T* from) {
    return *reinterpret_cast<const Pack<T, WIDTH>*>(from);
}

template <int WIDTH, typename T>
__device__ void store(T* to, const Pack<T, WIDTH>& pack) {
    *reinterpret_cast<Pack<T, WIDTH>*>(to) = pack;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % ACCESS_BYTES == 0; }

// Calls with a flag that the compiler knows, so that a kernel has no code for what is not asked for.
template <typename Call>
cudaError_t with_flag(bool flag, Call call) {
    return flag ? call(std::true_type{}) : call(std::false_type{});
}

// Unlike <<<>>>, which leaves its error to cudaGetLastError, where that of another launch may be.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace engine
