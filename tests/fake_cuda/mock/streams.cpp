// Streams, events, captures and graphs. Work is done as it is called for, so that there is nothing to wait for.
#include <cxxabi.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <utility>

#include "machine.h"

namespace mock {
namespace {

// What of each captured stream has come before a point: how many of its nodes.
using Clock = std::map<cudaStream_t, int>;

struct Capture {
    unsigned long long id;
    cudaStream_t origin;
    cudaStreamCaptureMode mode;
    int nodes = 0;
    bool valid = true;
    std::map<cudaStream_t, Clock> streams;
};

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
std::map<cudaStream_t, int> devices;
std::map<unsigned long long, Capture> captures;
std::map<cudaEvent_t, std::pair<unsigned long long, Clock>> captured_events;
std::map<cudaGraph_t, int> graphs;
std::map<cudaGraphExec_t, int> executables;

Capture* capture_of(cudaStream_t stream) {
    const Lock lock(mutex);
    for (auto& [id, capture] : captures) {
        if (capture.streams.count(stream)) return &capture;
    }
    return nullptr;
}

// What a capture cannot hold ends it.
cudaError_t refuse(Capture& capture) {
    capture.valid = false;
    return result(cudaErrorStreamCaptureUnsupported);
}

}  // namespace

bool enqueue(cudaStream_t stream) {
    const Lock lock(mutex);
    Capture* capture = capture_of(stream);
    if (!capture) return false;
    ++capture->nodes;
    ++capture->streams[stream][stream];
    return true;
}

cudaError_t host_may_wait() {
    const Lock lock(mutex);
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (auto& [id, capture] : captures) {
        if (capture.mode != cudaStreamCaptureModeRelaxed) return refuse(capture);
    }
    return cudaSuccess;
}

cudaError_t launch(const char* name, cudaStream_t stream, unsigned blocks, unsigned threads) {
    const Lock lock(mutex);
    if (stream && devices.at(stream) != current_device) return result(cudaErrorInvalidResourceHandle);
    enqueue(stream);
    int status = 0;
    char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    record(
        "kernel stream=%lu device=%d blocks=%u threads=%u name=%s", number(stream), current_device, blocks,
        threads, status == 0 ? readable : name);
    std::free(readable);
    return cudaSuccess;
}

}  // namespace mock

using namespace mock;

// ---------------------------------------------------------------- streams

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    const Lock lock(mutex);
    *stream = make_handle<cudaStream_t>();
    devices[*stream] = current_device;
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    Capture* capture = capture_of(stream);
    return capture ? refuse(*capture) : cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    record("synchronize stream=%lu", number(stream));
    Capture* capture = capture_of(stream);
    return capture ? refuse(*capture) : host_may_wait();
}

API cudaError_t cudaDeviceSynchronize() {
    record("synchronize device=%d", current_device);
    return host_may_wait();
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    record("host_function stream=%lu", number(stream));
    const bool captured = enqueue(stream);
    if (!captured) function(data);
    return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
    record("host_function stream=%lu", number(stream));
    if (enqueue(stream)) return result(cudaErrorStreamCaptureUnsupported);
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

// ---------------------------------------------------------------- events

#undef cudaEventCreate
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = make_handle<cudaEvent_t>();
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const Lock lock(mutex);
    captured_events.erase(event);
    return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    const Lock lock(mutex);
    record("record event=%lu stream=%lu", number(event), number(stream));
    captured_events.erase(event);
    if (Capture* capture = capture_of(stream)) captured_events[event] = {capture->id, capture->streams[stream]};
    return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

// A stream that waits for an event of a capture takes part in it.
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const Lock lock(mutex);
    record("wait event=%lu stream=%lu", number(event), number(stream));
    const auto captured = captured_events.find(event);
    if (captured == captured_events.end()) {
        return capture_of(stream) ? result(cudaErrorStreamCaptureIsolation) : cudaSuccess;
    }
    const auto& [id, clock] = captured->second;
    for (const auto& [other, nodes] : clock) {
        int& seen = captures.at(id).streams[stream][other];
        seen = seen < nodes ? nodes : seen;
    }
    captures.at(id).streams[stream];
    return cudaSuccess;
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
    const Lock lock(mutex);
    return captured_events.count(event) ? result(cudaErrorCapturedEvent) : cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const Lock lock(mutex);
    record("synchronize event=%lu", number(event));
    return captured_events.count(event) ? result(cudaErrorCapturedEvent) : cudaSuccess;
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;  // nothing takes time here; callers divide by it
    return cudaSuccess;
}

// ---------------------------------------------------------------- captures and graphs

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    const Lock lock(mutex);
    static unsigned long long last = 0;
    if (!stream || capture_of(stream)) return result(cudaErrorStreamCaptureUnsupported);
    record("capture_begin stream=%lu", number(stream));
    Capture& capture = captures[++last];
    capture.id = last;
    capture.origin = stream;
    capture.mode = mode;
    capture.streams[stream];
    return cudaSuccess;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const Lock lock(mutex);
    Capture* found = capture_of(stream);
    if (!found) return result(cudaErrorIllegalState);
    if (found->origin != stream) return result(cudaErrorStreamCaptureUnmatched);
    const Capture capture = *found;
    captures.erase(capture.id);
    for (auto event = captured_events.begin(); event != captured_events.end();) {
        event = event->second.first == capture.id ? captured_events.erase(event) : std::next(event);
    }
    record("capture_end stream=%lu nodes=%d", number(stream), capture.nodes);
    *graph = nullptr;
    if (!capture.valid) return result(cudaErrorStreamCaptureInvalidated);
    const auto done = [](const Clock& clock, cudaStream_t of) {
        const auto nodes = clock.find(of);
        return nodes == clock.end() ? 0 : nodes->second;
    };
    for (const auto& [other, clock] : capture.streams) {
        if (done(clock, other) > done(capture.streams.at(stream), other))
            return result(cudaErrorStreamCaptureUnjoined);
    }
    *graph = make_handle<cudaGraph_t>();
    graphs[*graph] = capture.nodes;
    return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

#undef cudaStreamGetCaptureInfo
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* count) {
    const Capture* capture = capture_of(stream);
    *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = nullptr;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    const Lock lock(mutex);
    *executable = make_handle<cudaGraphExec_t>();
    executables[*executable] = graphs.at(graph);
    return cudaSuccess;
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    const Lock lock(mutex);
    enqueue(stream);
    record("graph_launch stream=%lu nodes=%d", number(stream), executables.at(executable));
    return cudaSuccess;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    const Lock lock(mutex);
    if (!nodes) *count = graphs.at(graph);
    return cudaSuccess;
}

API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// What a graph keeps alive is kept for good.
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
    *object = make_handle<cudaUserObject_t>();
    return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
    return cudaSuccess;
}
