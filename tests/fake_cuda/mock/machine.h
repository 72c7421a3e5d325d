// The machine that the mock pretends to be.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>

#define API extern "C" __attribute__((visibility("default")))

namespace mock {

using Lock = std::lock_guard<std::recursive_mutex>;
extern std::recursive_mutex mutex;

// One line of the journal: the call, then key=value pairs. A value that may hold spaces comes last.
[[gnu::format(printf, 1, 2)]] void record(const char* format, ...);

// A new handle of whatever kind.
template <typename Handle>
Handle make_handle() {
    static uintptr_t last = 0x1000;
    const Lock lock(mutex);
    return reinterpret_cast<Handle>(last += 0x10);
}

inline unsigned long number(const void* handle) { return reinterpret_cast<uintptr_t>(handle); }

// Returns its argument, and keeps it for cudaGetLastError.
cudaError_t result(cudaError_t error);

// ---------------------------------------------------------------- devices and memory

int device_count();
size_t memory_of_a_device();
extern thread_local int current_device;

struct Allocation {
    size_t bytes;
    bool on_device;
    int device;
};

cudaError_t allocate(void** address, size_t bytes, bool on_device);
cudaError_t release(void* address);
size_t memory_in_use(int device);
// The allocation around an address, or null for the host's ordinary memory.
const Allocation* find(const void* address);

// ---------------------------------------------------------------- streams

// Work on a stream: a node of its capture, where there is one. Returns whether there is.
bool enqueue(cudaStream_t stream);

// Whether the host may wait for the device now: not within a capture, unless this thread relaxed it.
cudaError_t host_may_wait();

// A kernel on a stream of the current device.
cudaError_t launch(const char* name, cudaStream_t stream, unsigned blocks, unsigned threads);

}  // namespace mock
