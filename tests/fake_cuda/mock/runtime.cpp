// The rest of the runtime's API: devices, memory, and kernels, which do nothing.
#include <cstring>
#include <unordered_map>
#include <vector>

#include "machine.h"

using namespace mock;

namespace {

constexpr int MULTIPROCESSORS = 132, CAPABILITY_MAJOR = 9, CAPABILITY_MINOR = 0;
constexpr int THREADS_PER_BLOCK = 1024, THREADS_PER_MULTIPROCESSOR = 2048, REGISTERS = 65536;
constexpr size_t SHARED_MEMORY = 48 << 10, SHARED_MEMORY_ON_REQUEST = 227 << 10;

std::unordered_map<const void*, const char*> kernel_names;

unsigned volume(dim3 size) { return size.x * size.y * size.z; }

cudaError_t launch_host_stub(const void* function, dim3 grid, dim3 block, cudaStream_t stream) {
    const Lock lock(mutex);
    const auto name = kernel_names.find(function);
    if (name == kernel_names.end()) return result(cudaErrorInvalidDeviceFunction);
    if (!volume(grid) || volume(block) > THREADS_PER_BLOCK) return result(cudaErrorInvalidConfiguration);
    return launch(name->second, stream, volume(grid), volume(block));
}

cudaMemcpyKind direction(const void* to, const void* from, cudaMemcpyKind kind) {
    if (kind != cudaMemcpyDefault) return kind;
    const Allocation *target = find(to), *source = find(from);
    const bool to_device = target && target->on_device, from_device = source && source->on_device;
    if (to_device) return from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
    return from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

// "async" is the caller's word: a copy of pageable memory waits for the device all the same.
void copy(const char* call, void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    static const char* const names[] = {"H2H", "H2D", "D2H", "D2D"};
    kind = direction(to, from, kind);
    const void* host = kind == cudaMemcpyHostToDevice ? from : kind == cudaMemcpyDeviceToHost ? to : nullptr;
    const char* memory = !host ? "device" : find(host) ? "pinned" : "pageable";
    record("%s kind=%s bytes=%zu stream=%lu host=%s", call, names[kind], bytes, number(stream), memory);
    if (!enqueue(stream)) std::memmove(to, from, bytes);
}

}  // namespace

// ---------------------------------------------------------------- devices

API cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count();
    return cudaSuccess;
}

API cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return result(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

#undef cudaGetDeviceProperties
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    std::strcpy(properties->name, "Fake sm_90");
    properties->major = CAPABILITY_MAJOR;
    properties->minor = CAPABILITY_MINOR;
    properties->totalGlobalMem = memory_of_a_device();
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = THREADS_PER_BLOCK;
    properties->maxThreadsPerMultiProcessor = THREADS_PER_MULTIPROCESSOR;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->sharedMemPerBlock = SHARED_MEMORY;
    properties->sharedMemPerBlockOptin = SHARED_MEMORY_ON_REQUEST;
    properties->sharedMemPerMultiprocessor = 228 << 10;
    properties->regsPerBlock = properties->regsPerMultiprocessor = REGISTERS;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->l2CacheSize = 50 << 20;
    properties->textureAlignment = 512;
    properties->unifiedAddressing = properties->concurrentKernels = 1;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = CAPABILITY_MAJOR; break;
        case cudaDevAttrComputeCapabilityMinor: *value = CAPABILITY_MINOR; break;
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = THREADS_PER_BLOCK; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS_PER_MULTIPROCESSOR; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = REGISTERS; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_MEMORY; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_MEMORY_ON_REQUEST; break;
        default: *value = 1;  // most say whether a device can do something
    }
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int device) {
    std::snprintf(id, size, "0000:%02x:00.0", device);
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 1;
    return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

API cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---------------------------------------------------------------- memory

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = memory_of_a_device();
    *free = *total - memory_in_use(current_device);
    return cudaSuccess;
}

API cudaError_t cudaMalloc(void** address, size_t bytes) {
    const cudaError_t allowed = host_may_wait();
    return allowed == cudaSuccess ? allocate(address, bytes, true) : allowed;
}
API cudaError_t cudaFree(void* address) {
    const cudaError_t allowed = host_may_wait();
    return allowed == cudaSuccess ? release(address) : allowed;
}

API cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) { return allocate(address, bytes, false); }
API cudaError_t cudaFreeHost(void* address) { return release(address); }

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    *attributes = {};
    const Allocation* allocation = find(pointer);
    attributes->type = !allocation             ? cudaMemoryTypeUnregistered
                       : allocation->on_device ? cudaMemoryTypeDevice
                                               : cudaMemoryTypeHost;
    if (!allocation) return cudaSuccess;
    attributes->device = allocation->device;
    attributes->devicePointer = const_cast<void*>(pointer);
    if (!allocation->on_device) attributes->hostPointer = attributes->devicePointer;
    return cudaSuccess;
}

API cudaError_t
cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    copy("copy", to, from, bytes, kind, stream);
    return cudaSuccess;
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    copy("copy", to, from, bytes, cudaMemcpyDeviceToDevice, stream);
    return cudaSuccess;
}

API cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
    cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; ++row) {
        const auto* source = static_cast<const char*>(from) + row * from_pitch;
        copy("copy", static_cast<char*>(to) + row * to_pitch, source, width, kind, stream);
    }
    return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    const cudaError_t allowed = host_may_wait();
    if (allowed != cudaSuccess) return allowed;
    copy("copy_and_wait", to, from, bytes, kind, nullptr);
    return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    record("fill bytes=%zu stream=%lu", bytes, number(stream));
    if (!enqueue(stream)) std::memset(to, value, bytes);
    return cudaSuccess;
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, nullptr);
}

// ---------------------------------------------------------------- kernels

API void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

API void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    const Lock lock(mutex);
    kernel_names[stub] = name;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    void* stream;
};
static thread_local std::vector<Configuration> configurations;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    const Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared = last.shared;
    *static_cast<void**>(stream) = last.stream;
    return cudaSuccess;
}

API cudaError_t
cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch_host_stub(function, grid, block, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    return launch_host_stub(function, config->gridDim, config->blockDim, config->stream);
}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
    return cudaSuccess;
}

API cudaError_t
__cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch_host_stub(kernel, grid, block, stream);
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->numRegs = 32;
    attributes->maxThreadsPerBlock = THREADS_PER_BLOCK;
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

API cudaError_t
cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t, unsigned) {
    *blocks = THREADS_PER_MULTIPROCESSOR / threads;
    return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char memory[1 << 20];
    *address = memory;
    return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    return cudaSuccess;
}
