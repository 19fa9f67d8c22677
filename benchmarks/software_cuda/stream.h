// Streams: queues of work that is done when somebody waits for it, and no sooner.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>
#include <string>

namespace software_cuda {

using Task = std::function<void()>;

// Held by every call.
std::recursive_mutex & lock();

// Appends a task to a stream, or to the graph that the stream captures.
void enqueue(cudaStream_t stream, const std::string & what, Task task);

// Whether kernels and products are left out (SOFTWARE_CUDA_KERNELS=skip): enough to see what memory is taken.
bool skips_kernels();

// Appends a kernel or a product, unless they are left out.
void enqueue_kernel(cudaStream_t stream, const std::string & name, Task task);

// Appends a line to the file that SOFTWARE_CUDA_TRACE names.
void trace(const std::string & line);

// Does all work of all streams.
void drain_all();

}  // namespace software_cuda
