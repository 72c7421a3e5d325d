// As much of the driver's API as torch and triton call.
#include <cuda.h>
#include <dlfcn.h>

#include <string>
#include <unordered_map>

#include "machine.h"

// Most of these names are macros for a later version of the same.
#undef cuCtxPopCurrent
#undef cuCtxPushCurrent
#undef cuModuleLoadData
#undef cuModuleGetFunction

using namespace mock;

namespace {

const CUcontext context = reinterpret_cast<CUcontext>(0x10);
std::unordered_map<CUfunction, std::string> kernel_names;

CUresult launch_kernel(CUfunction function, CUstream stream, unsigned blocks, unsigned threads) {
    const Lock lock(mutex);
    const auto name = kernel_names.find(function);
    if (name == kernel_names.end()) return CUDA_ERROR_INVALID_HANDLE;
    if (!blocks) return CUDA_ERROR_INVALID_VALUE;
    return static_cast<CUresult>(launch(name->second.c_str(), stream, blocks, threads));
}

}  // namespace

extern "C" CUresult not_supported(...) { return CUDA_ERROR_NOT_SUPPORTED; }

// What torch's and triton's libraries must find to be loaded, and nothing here calls.
#define NOT_SUPPORTED(name) asm(".globl " #name "\n.set " #name ", not_supported")
NOT_SUPPORTED(cuCtxGetLimit);
NOT_SUPPORTED(cuCtxSetLimit);
NOT_SUPPORTED(cuLaunchCooperativeKernel);
NOT_SUPPORTED(cuLinkAddData_v2);
NOT_SUPPORTED(cuLinkComplete);
NOT_SUPPORTED(cuLinkCreate_v2);
NOT_SUPPORTED(cuModuleLoadDataEx);
NOT_SUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor);
NOT_SUPPORTED(cuTensorMapEncodeTiled);

API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = reinterpret_cast<void*>(&not_supported);
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "an error of the mock driver";
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------- devices and contexts

API CUresult cuDeviceGetCount(int* count) {
    *count = device_count();
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    return static_cast<CUresult>(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device));
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* given, CUdevice) {
    *given = context;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext* current) {
    *current = context;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice* device) {
    *device = current_device;
    return CUDA_SUCCESS;
}

API CUresult cuStreamGetCtx(CUstream, CUcontext* of) {
    *of = context;
    return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }

API CUresult cuCtxPopCurrent_v2(CUcontext* current) {
    *current = context;
    return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
    if (!find(reinterpret_cast<void*>(pointer))) return CUDA_ERROR_INVALID_VALUE;  // memory of the host
    *static_cast<CUdeviceptr*>(value) = pointer;
    return CUDA_SUCCESS;
}

// ---------------------------------------------------------------- kernels

API CUresult cuModuleLoadData(CUmodule* module, const void*) {
    record("module_load");
    *module = make_handle<CUmodule>();
    return CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    const Lock lock(mutex);
    *function = make_handle<CUfunction>();
    kernel_names[*function] = name;
    return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
             : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                    : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
    *clusters = 1;
    return CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned, CUstream stream, void**, void**) {
    return launch_kernel(function, stream, grid_x * grid_y * grid_z, block_x * block_y * block_z);
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
    return launch_kernel(
        function, config->hStream, config->gridDimX * config->gridDimY * config->gridDimZ,
        config->blockDimX * config->blockDimY * config->blockDimZ);
}
