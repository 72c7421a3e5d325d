// The journal, errors and memory.
#include "machine.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace mock {

std::recursive_mutex mutex;
thread_local int current_device = 0;

namespace {

std::string journal;
thread_local cudaError_t last_error = cudaSuccess;
std::map<uintptr_t, Allocation> allocations;
std::map<int, size_t> in_use;

double setting(const char* name, double otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atof(value) : otherwise;
}

}  // namespace

void record(const char* format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    const Lock lock(mutex);
    journal += line;
    journal += '\n';
}

cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

int device_count() { return static_cast<int>(setting("FAKE_CUDA_DEVICES", 1)); }
size_t memory_of_a_device() { return static_cast<size_t>(setting("FAKE_CUDA_GIB", 80) * (1 << 30)); }

cudaError_t allocate(void** address, size_t bytes, bool on_device) {
    const Lock lock(mutex);
    size_t& used = in_use[current_device];
    if (on_device && used + bytes > memory_of_a_device()) return result(cudaErrorMemoryAllocation);
    const size_t mapped = bytes ? bytes : 1;
    *address = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return result(cudaErrorMemoryAllocation);
    allocations[reinterpret_cast<uintptr_t>(*address)] = {mapped, on_device, current_device};
    if (on_device) used += mapped;
    record("%s bytes=%zu device=%d", on_device ? "malloc" : "host_malloc", bytes, current_device);
    return cudaSuccess;
}

cudaError_t release(void* address) {
    const Lock lock(mutex);
    const auto found = allocations.find(reinterpret_cast<uintptr_t>(address));
    if (found == allocations.end()) return address ? result(cudaErrorInvalidValue) : cudaSuccess;
    const Allocation allocation = found->second;
    if (allocation.on_device) in_use[allocation.device] -= allocation.bytes;
    record(
        "%s bytes=%zu device=%d", allocation.on_device ? "free" : "host_free", allocation.bytes,
        allocation.device);
    munmap(address, allocation.bytes);
    allocations.erase(found);
    return cudaSuccess;
}

size_t memory_in_use(int device) { return in_use[device]; }

const Allocation* find(const void* pointer) {
    const Lock lock(mutex);
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return nullptr;
    --after;
    return address < after->first + after->second.bytes ? &after->second : nullptr;
}

}  // namespace mock

using namespace mock;

API const char* fake_cuda_journal() { return journal.c_str(); }

API void fake_cuda_clear() {
    const Lock lock(mutex);
    journal.clear();
}

// ---------------------------------------------------------------- errors

API cudaError_t cudaPeekAtLastError() { return last_error; }

API cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
