// Measures how fast this GPU reads and copies its memory; prints bytes per second as JSON.
//
// Decoding reads every weight once a step and writes next to nothing, so that the reading kernel gives the limit. Each pass
// is timed with events of its own, and the best of 20 counts.

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                    \
    do {                                                                               \
        cudaError_t status = (call);                                                   \
        if (status != cudaSuccess) {                                                   \
            std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));       \
            std::exit(1);                                                              \
        }                                                                              \
    } while (0)

// Sums up in registers; the sum is written only where it has a value that zeros never give, so that the compiler must keep the reads.
__global__ void read_all(const uint4 *data, std::size_t count, unsigned *sink) {
    unsigned sum = 0;
    const std::size_t stride = std::size_t(gridDim.x) * blockDim.x;
    for (std::size_t i = std::size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const uint4 value = data[i];
        sum += value.x + value.y + value.z + value.w;
    }
    if (sum == 1) {
        *sink = sum;
    }
}

int main() {
    const std::size_t bytes = std::size_t(1) << 30;
    const int passes = 20;
    void *source = nullptr, *target = nullptr;
    unsigned *sink = nullptr;
    CHECK(cudaMalloc(&source, bytes));
    CHECK(cudaMalloc(&target, bytes));
    CHECK(cudaMalloc(&sink, sizeof(unsigned)));
    CHECK(cudaMemset(source, 0, bytes));
    int processors = 0;
    CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));

    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    float best_read = 1e30f, best_copy = 1e30f;
    for (int pass = 0; pass < passes + 2; ++pass) {
        float milliseconds = 0;
        CHECK(cudaEventRecord(start));
        read_all<<<processors * 16, 256>>>(static_cast<const uint4 *>(source), bytes / sizeof(uint4), sink);
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(stop));
        CHECK(cudaEventSynchronize(stop));
        CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
        if (pass >= 2 && milliseconds < best_read) {
            best_read = milliseconds;
        }
        CHECK(cudaEventRecord(start));
        CHECK(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice));
        CHECK(cudaEventRecord(stop));
        CHECK(cudaEventSynchronize(stop));
        CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
        if (pass >= 2 && milliseconds < best_copy) {
            best_copy = milliseconds;
        }
    }
    std::printf("{\"read\": %.6e, \"copy\": %.6e}\n", bytes / (best_read / 1e3), 2.0 * bytes / (best_copy / 1e3));
    return 0;
}
