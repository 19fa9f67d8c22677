// The calls of the CUDA runtime that ggml's backend makes, but for those of streams: the device and its properties,
// memory and copies, kernels.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "calls.h"
#include "kernels.h"
#include "memory.h"
#include "stream.h"

using namespace software_cuda;

namespace {

thread_local cudaError_t last_error = cudaSuccess;

constexpr int kSharedPerBlock = 48 * 1024;
constexpr int kSharedPerBlockOptIn = 227 * 1024;
constexpr int kSharedPerMultiprocessor = 228 * 1024;
constexpr int kThreadsPerBlock = 1024;
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kRegisters = 65536;
// A guess for all kernels, since theirs are in machine code that nobody reads here.
constexpr int kRegistersPerThread = 128;

// What nvcc registered: a kernel by the address of its stub.
struct Function {
    std::string name;
    int shared_limit = kSharedPerBlock;
    bool looked_up = false;
    Kernel kernel;
};

std::map<const void *, Function> & functions() {
    static auto & all = *new std::map<const void *, Function>;
    return all;
}

Function & function_of(const void * stub) {
    const auto found = functions().find(stub);
    if (found == functions().end()) {
        fault("a kernel is launched that was never registered");
    }
    return found->second;
}

bool hidden() {
    const char * visible = std::getenv("CUDA_VISIBLE_DEVICES");
    return visible != nullptr && std::strcmp(visible, "0") != 0 && std::string(visible).rfind("0,", 0) != 0;
}

cudaError_t launch(Function & function, const Launch & how, void ** arguments, cudaStream_t stream) {
    const auto threads = std::size_t{how.block.x} * how.block.y * how.block.z;
    const bool empty = threads == 0 || how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0;
    const bool large = threads > kThreadsPerBlock || how.block.z > 64 || how.grid.x > 0x7fffffff ||
                       how.grid.y > 0xffff || how.grid.z > 0xffff;
    if (empty || large) {
        return failed(cudaErrorInvalidConfiguration);
    }
    if (how.shared > static_cast<std::size_t>(function.shared_limit)) {
        return failed(cudaErrorInvalidValue);
    }
    if (skips_kernels()) {
        return cudaSuccess;
    }
    if (!function.looked_up) {
        function.kernel = find_kernel(function.name);
        function.looked_up = true;
    }
    if (!function.kernel.bind) {
        fault("there is no software version of the kernel " + function.name);
    }
    enqueue_kernel(stream, function.name, function.kernel.bind(how, arguments));
    return cudaSuccess;
}

// The direction of a copy, checked against the addresses.
bool directed(const void * to, const void * from, cudaMemcpyKind kind) {
    const bool to_device = is_device(to), from_device = is_device(from);
    switch (kind) {
        case cudaMemcpyHostToHost: return !to_device && !from_device;
        case cudaMemcpyHostToDevice: return to_device && !from_device;
        case cudaMemcpyDeviceToHost: return !to_device && from_device;
        case cudaMemcpyDeviceToDevice: return to_device && from_device;
        default: return true;
    }
}

const char * direction(const void * to, const void * from) {
    if (is_device(to)) {
        return is_device(from) ? "device-to-device" : "host-to-device";
    }
    return is_device(from) ? "device-to-host" : "host-to-host";
}

char * reached(const void * address, std::size_t bytes) {
    return is_device(address) ? resolve(address, bytes) : static_cast<char *>(const_cast<void *>(address));
}

// Copies rows; whatever is not pinned is read at once, and written when the copy is done.
cudaError_t copy(void * to, std::size_t to_pitch, const void * from, std::size_t from_pitch, std::size_t width,
                 std::size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    if (width == 0 || height == 0) {
        return cudaSuccess;
    }
    if (!directed(to, from, kind)) {
        return failed(cudaErrorInvalidValue);
    }
    const std::size_t to_bytes = (height - 1) * to_pitch + width, from_bytes = (height - 1) * from_pitch + width;
    reached(to, to_bytes);
    reached(from, from_bytes);
    const bool pinned = is_pinned(is_device(to) ? from : to);
    std::shared_ptr<std::vector<char>> staged;
    if (!is_device(from) && !pinned) {
        const char * first = static_cast<const char *>(from);
        staged = std::make_shared<std::vector<char>>(first, first + from_bytes);
    }
    const std::string what = std::string("copy ") + direction(to, from) + (pinned ? " pinned " : " ");
    enqueue(stream, what, [=] {
        trace(what + std::to_string(width * height));
        char * target = reached(to, to_bytes);
        const char * source = staged ? staged->data() : reached(from, from_bytes);
        for (std::size_t row = 0; row < height; row++) {
            std::memmove(target + row * to_pitch, source + row * from_pitch, width);
        }
    });
    return cudaSuccess;
}

cudaError_t fill(void * address, int value, std::size_t bytes, cudaStream_t stream) {
    resolve(address, bytes);
    enqueue(stream, "fill", [=] { std::memset(resolve(address, bytes), value, bytes); });
    return cudaSuccess;
}

cudaError_t allocate_host(void ** address, std::size_t bytes) {
    const std::lock_guard held(lock());
    if (posix_memalign(address, 4096, std::max<std::size_t>(bytes, 1)) != 0) {
        return failed(cudaErrorMemoryAllocation);
    }
    pin(*address, bytes);
    trace("malloc-host " + std::to_string(bytes));
    return cudaSuccess;
}

struct Configuration {
    Launch how;
    cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;

}  // namespace

cudaError_t software_cuda::failed(cudaError_t error) {
    last_error = error;
    return error;
}

extern "C" {

// The device.

cudaError_t cudaGetDeviceCount(int * count) {
    *count = hidden() ? 0 : 1;
    return hidden() ? failed(cudaErrorNoDevice) : cudaSuccess;
}

cudaError_t cudaGetDevice(int * device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice); }

cudaError_t cudaSetDeviceFlags(unsigned int) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int device) {
    if (device != 0) {
        return failed(cudaErrorInvalidDevice);
    }
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "software device, with the properties of an H100");
    properties->totalGlobalMem = device_total();
    properties->sharedMemPerBlock = kSharedPerBlock;
    properties->sharedMemPerBlockOptin = kSharedPerBlockOptIn;
    properties->sharedMemPerMultiprocessor = kSharedPerMultiprocessor;
    properties->reservedSharedMemPerBlock = 1024;
    properties->regsPerBlock = properties->regsPerMultiprocessor = kRegisters;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = kThreadsPerBlock;
    properties->maxThreadsPerMultiProcessor = kThreadsPerMultiprocessor;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->major = 9;
    properties->multiProcessorCount = 132;
    properties->canMapHostMemory = properties->unifiedAddressing = properties->concurrentKernels = 1;
    properties->cooperativeLaunch = properties->hostRegisterSupported = 1;
    properties->asyncEngineCount = 3;
    properties->l2CacheSize = 50 << 20;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrCooperativeLaunch) {
        fault("device attribute " + std::to_string(attribute) + " is not known here");
    }
    *value = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char * text, int size, int) {
    std::snprintf(text, static_cast<std::size_t>(size), "0000:01:00.0");
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int * can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned int) { return failed(cudaErrorInvalidDevice); }

cudaError_t cudaMemGetInfo(std::size_t * free, std::size_t * total) {
    const std::lock_guard held(lock());
    *free = device_free();
    *total = device_total();
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

const char * cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        default: return "another error of the software device";
    }
}

// Memory.

cudaError_t cudaMalloc(void ** address, std::size_t bytes) {
    const std::lock_guard held(lock());
    *address = device_allocate(bytes);
    trace((*address != nullptr ? "malloc " : "malloc-refused ") + std::to_string(bytes));
    return *address != nullptr ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

cudaError_t cudaMallocManaged(void **, std::size_t, unsigned int) { return failed(cudaErrorNotSupported); }

cudaError_t cudaFree(void * address) {
    const std::lock_guard held(lock());
    drain_all();
    if (address == nullptr) {
        return cudaSuccess;
    }
    trace("free " + std::to_string(allocation_of(address).last - allocation_of(address).first));
    return device_release(address) ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMallocHost(void ** address, std::size_t bytes) { return allocate_host(address, bytes); }

cudaError_t cudaHostAlloc(void ** address, std::size_t bytes, unsigned int) { return allocate_host(address, bytes); }

cudaError_t cudaFreeHost(void * address) {
    const std::lock_guard held(lock());
    drain_all();
    if (address != nullptr && !unpin(address)) {
        return failed(cudaErrorInvalidValue);
    }
    std::free(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void * address, std::size_t bytes, unsigned int) {
    const std::lock_guard held(lock());
    pin(address, bytes);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void * address) {
    const std::lock_guard held(lock());
    drain_all();
    return unpin(address) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaHostGetDevicePointer(void ** device, void * host, unsigned int) {
    *device = host;
    return is_pinned(host) ? cudaSuccess : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMemcpyAsync(void * to, const void * from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    const std::lock_guard held(lock());
    return copy(to, bytes, from, bytes, bytes, 1, kind, stream);
}

cudaError_t cudaMemcpy2DAsync(void * to, std::size_t to_pitch, const void * from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    const std::lock_guard held(lock());
    return copy(to, to_pitch, from, from_pitch, width, height, kind, stream);
}

cudaError_t cudaMemcpyPeerAsync(void * to, int, const void * from, int, std::size_t bytes, cudaStream_t stream) {
    const std::lock_guard held(lock());
    return copy(to, bytes, from, bytes, bytes, 1, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemset(void * address, int value, std::size_t bytes) {
    const std::lock_guard held(lock());
    return fill(address, value, bytes, cudaStreamLegacy);
}

cudaError_t cudaMemsetAsync(void * address, int value, std::size_t bytes, cudaStream_t stream) {
    const std::lock_guard held(lock());
    return fill(address, value, bytes, stream);
}

// Kernels.

void ** __cudaRegisterFatBinary(void *) {
    static void * handle = nullptr;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void **) {}

void __cudaUnregisterFatBinary(void **) {}

void __cudaRegisterVar(void **, char *, char *, const char *, int, std::size_t, int, int) {}

void __cudaRegisterFunction(void **, const char * stub, char *, const char * name, int, uint3 *, uint3 *, dim3 *,
                            dim3 *, int *) {
    const std::lock_guard held(lock());
    functions()[stub].name = demangled(name);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, CUstream_st * stream) {
    configurations.push_back({{grid, block, shared}, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 * grid, dim3 * block, std::size_t * shared, void * stream) {
    const Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.how.grid;
    *block = last.how.block;
    *shared = last.how.shared;
    *static_cast<cudaStream_t *>(stream) = last.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t * kernel, const void * stub) {
    const std::lock_guard held(lock());
    *kernel = reinterpret_cast<cudaKernel_t>(&function_of(stub));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void ** arguments, std::size_t shared,
                               cudaStream_t stream) {
    const std::lock_guard held(lock());
    return launch(*reinterpret_cast<Function *>(kernel), {grid, block, shared}, arguments, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t * how, const void * stub, void ** arguments) {
    const std::lock_guard held(lock());
    return launch(function_of(stub), {how->gridDim, how->blockDim, how->dynamicSmemBytes}, arguments, how->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void * stub, dim3 grid, dim3 block, void ** arguments,
                                        std::size_t shared, cudaStream_t stream) {
    const std::lock_guard held(lock());
    return launch(function_of(stub), {grid, block, shared}, arguments, stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes * attributes, const void * stub) {
    const std::lock_guard held(lock());
    *attributes = {};
    attributes->binaryVersion = attributes->ptxVersion = 90;
    attributes->maxThreadsPerBlock = kThreadsPerBlock;
    attributes->numRegs = kRegistersPerThread;
    attributes->maxDynamicSharedSizeBytes = function_of(stub).shared_limit;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void * stub, cudaFuncAttribute attribute, int value) {
    const std::lock_guard held(lock());
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kSharedPerBlockOptIn) {
        return failed(cudaErrorInvalidValue);
    }
    function_of(stub).shared_limit = value;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int * count, const void *, int threads,
                                                                   std::size_t shared, unsigned int) {
    const int by_memory = kSharedPerMultiprocessor / static_cast<int>(shared + 1024);
    const int by_registers = kRegisters / (kRegistersPerThread * threads);
    *count = std::max(1, std::min({kThreadsPerMultiprocessor / threads, by_memory, by_registers}));
    return cudaSuccess;
}

}  // extern "C"
