// Streams, events and graphs. Work waits in its stream until a call waits for it: host code that reads a result, or
// reuses a pinned buffer, without waiting for it first sees what was there before.
#include "stream.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>
#include <memory>
#include <set>
#include <vector>

#include "calls.h"
#include "memory.h"

// One recording of an event: what a wait refers to, even if the event is recorded again.
struct Recording {
    CUstream_st * stream;
    bool done = false;
};

struct Work {
    std::string what;
    software_cuda::Task run;
    std::shared_ptr<Recording> waits_for;
    std::shared_ptr<Recording> records;
};

struct CUgraph_st {
    std::vector<Work> nodes;
};

struct CUgraphExec_st {
    std::vector<Work> nodes;
};

struct CUevent_st {
    std::shared_ptr<Recording> latest;
};

struct CUstream_st {
    bool waits_for_legacy = true;
    std::deque<Work> queue;
    std::unique_ptr<CUgraph_st> captured;
};

namespace software_cuda {
namespace {

std::set<cudaStream_t> & streams() {
    static auto & all = *new std::set<cudaStream_t>;
    return all;
}

cudaStream_t legacy() {
    static auto * const stream = new CUstream_st;
    return stream;
}

cudaStream_t per_thread() {
    thread_local cudaStream_t stream = nullptr;
    if (stream == nullptr) {
        stream = new CUstream_st;
        streams().insert(stream);
    }
    return stream;
}

// Follows the handles with a meaning of their own.
cudaStream_t actual(cudaStream_t stream) {
    if (stream == nullptr || stream == cudaStreamLegacy) {
        return legacy();
    }
    if (stream == cudaStreamPerThread) {
        return per_thread();
    }
    if (streams().count(stream) == 0) {
        fault("a call names a stream that does not exist");
    }
    return stream;
}

// Works off a stream, to its end or to a recording.
void drain(cudaStream_t stream, const Recording * until = nullptr) {
    while (!stream->queue.empty()) {
        const Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        if (work.waits_for && !work.waits_for->done) {
            drain(work.waits_for->stream, work.waits_for.get());
        }
        if (work.run) {
            work.run();
        }
        if (work.records) {
            work.records->done = true;
            if (work.records.get() == until) {
                return;
            }
        }
    }
}

void append(cudaStream_t handle, Work work) {
    cudaStream_t stream = actual(handle);
    if (stream->captured) {
        if (work.waits_for || work.records) {
            fault("events are not known in a captured graph");
        }
        stream->captured->nodes.push_back(std::move(work));
        return;
    }
    if (stream == legacy()) {
        // It begins when the other streams, but for those that do not care, are done, and they wait for it.
        for (cudaStream_t other : streams()) {
            if (other->waits_for_legacy) {
                drain(other);
            }
        }
        stream->queue.push_back(std::move(work));
        drain(stream);
        return;
    }
    stream->queue.push_back(std::move(work));
}

int trace_file() {
    static const int file = [] {
        const char * path = std::getenv("SOFTWARE_CUDA_TRACE");
        return path == nullptr ? -1 : open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    }();
    return file;
}

}  // namespace

std::recursive_mutex & lock() {
    static auto & one = *new std::recursive_mutex;
    return one;
}

void enqueue(cudaStream_t stream, const std::string & what, Task task) {
    const std::lock_guard held(lock());
    append(stream, {what, std::move(task), nullptr, nullptr});
}

bool skips_kernels() {
    static const bool skip = [] {
        const char * wanted = std::getenv("SOFTWARE_CUDA_KERNELS");
        return wanted != nullptr && std::string(wanted) == "skip";
    }();
    return skip;
}

void enqueue_kernel(cudaStream_t stream, const std::string & name, Task task) {
    if (!skips_kernels()) {
        enqueue(stream, name, [name, run = std::move(task)] {
            trace("kernel " + name);
            run();
        });
    }
}

void trace(const std::string & line) {
    if (trace_file() >= 0) {
        const std::string whole = line + "\n";
        if (write(trace_file(), whole.data(), whole.size()) != static_cast<ssize_t>(whole.size())) {
            fault("the trace cannot be written");
        }
    }
}

void drain_all() {
    for (cudaStream_t stream : streams()) {
        drain(stream);
    }
}

}  // namespace software_cuda

using namespace software_cuda;

extern "C" {

cudaError_t cudaStreamCreateWithFlags(cudaStream_t * stream, unsigned int flags) {
    const std::lock_guard held(lock());
    *stream = new CUstream_st;
    (*stream)->waits_for_legacy = (flags & cudaStreamNonBlocking) == 0;
    streams().insert(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const std::lock_guard held(lock());
    drain(actual(stream));
    streams().erase(stream);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const std::lock_guard held(lock());
    if (actual(stream)->captured) {
        return failed(cudaErrorStreamCaptureUnsupported);
    }
    drain(actual(stream));
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    const std::lock_guard held(lock());
    drain_all();
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int) {
    const std::lock_guard held(lock());
    if (event->latest) {
        append(stream, {"wait", nullptr, event->latest, nullptr});
    }
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t * event, unsigned int) {
    *event = new CUevent_st;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const std::lock_guard held(lock());
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const std::lock_guard held(lock());
    event->latest = std::make_shared<Recording>(Recording{actual(stream)});
    append(stream, {"record", nullptr, nullptr, event->latest});
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const std::lock_guard held(lock());
    if (event->latest && !event->latest->done) {
        drain(event->latest->stream, event->latest.get());
    }
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    const std::lock_guard held(lock());
    if (actual(stream)->captured || actual(stream) == legacy()) {
        return failed(cudaErrorStreamCaptureUnsupported);
    }
    actual(stream)->captured = std::make_unique<CUgraph_st>();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t * graph) {
    const std::lock_guard held(lock());
    if (!actual(stream)->captured) {
        return failed(cudaErrorIllegalState);
    }
    *graph = actual(stream)->captured.release();
    trace("captured " + std::to_string((*graph)->nodes.size()) + " nodes");
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus * status) {
    const std::lock_guard held(lock());
    *status = actual(stream)->captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t * instance, cudaGraph_t graph, unsigned long long) {
    const std::lock_guard held(lock());
    *instance = new CUgraphExec_st{graph->nodes};
    return cudaSuccess;
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t instance, cudaGraph_t graph, cudaGraphExecUpdateResultInfo * result) {
    const std::lock_guard held(lock());
    *result = {};
    bool same = instance->nodes.size() == graph->nodes.size();
    for (std::size_t i = 0; same && i < graph->nodes.size(); i++) {
        same = instance->nodes[i].what == graph->nodes[i].what;
    }
    if (!same) {
        result->result = cudaGraphExecUpdateErrorTopologyChanged;
        return failed(cudaErrorGraphExecUpdateFailure);
    }
    instance->nodes = graph->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
    const std::lock_guard held(lock());
    trace("launch of " + std::to_string(instance->nodes.size()) + " nodes");
    for (const Work & node : instance->nodes) {
        append(stream, node);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
    delete instance;
    return cudaSuccess;
}

}  // extern "C"
