// The calls of cuBLAS that ggml's backend makes for matrix products, as work on a stream of the software device.
#include <cublas_v2.h>

#include <cstring>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "stream.h"

using namespace software_cuda;

struct cublasContext {
    cudaStream_t stream = nullptr;
};

namespace {

// A matrix on the device, in columns.
struct Matrix {
    const void * data;
    cudaDataType_t type;
    long long stride;  // of columns, in elements
    bool transposed;
};

std::size_t size_of(cudaDataType_t type) {
    switch (type) {
        case CUDA_R_32F: return 4;
        case CUDA_R_16F: return 2;
        case CUDA_R_16BF: return 2;
        default: fault("cuBLAS is given a type that is not known here");
    }
}

// The top half of a float.
struct BFloat16 {
    std::uint16_t bits;
};

float to_float(BFloat16 value) {
    const std::uint32_t bits = std::uint32_t{value.bits} << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

float to_float(__half value) { return software_cuda::to_float(value); }
float to_float(float value) { return value; }

// Calls a function with elements of a type.
template <class F> auto with(cudaDataType_t type, const char * data, F function) {
    switch (type) {
        case CUDA_R_32F: return function(reinterpret_cast<const float *>(data));
        case CUDA_R_16F: return function(reinterpret_cast<const __half *>(data));
        default: return function(reinterpret_cast<const BFloat16 *>(data));
    }
}

float load(const char * from, cudaDataType_t type) {
    return with(type, from, [](const auto * value) { return to_float(*value); });
}

void store(char * to, cudaDataType_t type, float value) {
    if (type == CUDA_R_32F) {
        std::memcpy(to, &value, sizeof value);
    } else if (type == CUDA_R_16F) {
        const __half half = from_float<__half>(value);
        std::memcpy(to, &half, sizeof half);
    } else {
        fault("cuBLAS is to write a type that is not known here");
    }
}

// Vectors of `length` as float, one after the other: the rows of op(A) when it is transposed, the columns when not.
std::vector<float> packed(const Matrix & matrix, int vectors, int length, bool along) {
    const long long step = along ? 1 : matrix.stride, next = along ? matrix.stride : 1;
    const std::size_t reach = static_cast<std::size_t>((vectors - 1) * next + (length - 1) * step + 1);
    std::vector<float> result(static_cast<std::size_t>(vectors) * length);
    with(matrix.type, resolve(matrix.data, reach * size_of(matrix.type)), [&](const auto * data) {
        for (int v = 0; v < vectors; v++) {
            for (int i = 0; i < length; i++) {
                result[static_cast<std::size_t>(v) * length + i] = to_float(data[v * next + i * step]);
            }
        }
        return 0.0f;
    });
    return result;
}

// C = alpha op(A) op(B) + beta C, with op(A) of m by k and op(B) of k by n.
void multiply(int m, int n, int k, float alpha, const Matrix & a, const Matrix & b, float beta, const Matrix & c) {
    const std::vector<float> rows = packed(a, m, k, a.transposed), columns = packed(b, n, k, !b.transposed);
    const std::size_t size = size_of(c.type);
    char * data = resolve(c.data, static_cast<std::size_t>((n - 1) * c.stride + m) * size);
    for (int j = 0; j < n; j++) {
        const float * column = columns.data() + static_cast<std::size_t>(j) * k;
        for (int i = 0; i < m; i++) {
            const float * row = rows.data() + static_cast<std::size_t>(i) * k;
            float sum = 0;
            for (int l = 0; l < k; l++) {
                sum += row[l] * column[l];
            }
            char * place = data + (j * c.stride + i) * size;
            store(place, c.type, alpha * sum + (beta == 0 ? 0 : beta * load(place, c.type)));
        }
    }
}

// Scalars are on the host and may be gone when the product is computed.
float scalar(const void * value, cublasComputeType_t type) {
    return load(static_cast<const char *>(value), type == CUBLAS_COMPUTE_16F ? CUDA_R_16F : CUDA_R_32F);
}

bool transposed(cublasOperation_t operation) {
    if (operation != CUBLAS_OP_N && operation != CUBLAS_OP_T) {
        fault("cuBLAS is given an operation that is not known here");
    }
    return operation == CUBLAS_OP_T;
}

const void * shifted(const void * data, long long elements, cudaDataType_t type) {
    return static_cast<const char *>(data) + elements * static_cast<long long>(size_of(type));
}

}  // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t * handle) {
    *handle = new cublasContext;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void * workspace, size_t bytes) {
    resolve(workspace, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

const char * cublasGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS ? "success" : "an error of the software device";
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n,
                              int k, const float * alpha, const float * a, int lda, const float * b, int ldb,
                              const float * beta, float * c, int ldc) {
    return cublasGemmEx(handle, of_a, of_b, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c,
                        CUDA_R_32F, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n,
                            int k, const void * alpha, const void * a, cudaDataType a_type, int lda, const void * b,
                            cudaDataType b_type, int ldb, const void * beta, void * c, cudaDataType c_type, int ldc,
                            cublasComputeType_t type, cublasGemmAlgo_t algorithm) {
    return cublasGemmStridedBatchedEx(handle, of_a, of_b, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta,
                                      c, c_type, ldc, 0, 1, type, algorithm);
}

cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b,
                                         int m, int n, int k, const float * alpha, const float * a, int lda,
                                         long long a_next, const float * b, int ldb, long long b_next,
                                         const float * beta, float * c, int ldc, long long c_next, int count) {
    return cublasGemmStridedBatchedEx(handle, of_a, of_b, m, n, k, alpha, a, CUDA_R_32F, lda, a_next, b, CUDA_R_32F,
                                      ldb, b_next, beta, c, CUDA_R_32F, ldc, c_next, count, CUBLAS_COMPUTE_32F,
                                      CUBLAS_GEMM_DEFAULT);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b,
                                          int m, int n, int k, const void * alpha, const void * a,
                                          cudaDataType a_type, int lda, long long a_next, const void * b,
                                          cudaDataType b_type, int ldb, long long b_next, const void * beta, void * c,
                                          cudaDataType c_type, int ldc, long long c_next, int count,
                                          cublasComputeType_t type, cublasGemmAlgo_t) {
    const float scale = scalar(alpha, type), keep = scalar(beta, type);
    const bool turn_a = transposed(of_a), turn_b = transposed(of_b);
    enqueue_kernel(handle->stream, "cublas", [=] {
        for (long long i = 0; i < count; i++) {
            multiply(m, n, k, scale, {shifted(a, i * a_next, a_type), a_type, lda, turn_a},
                     {shifted(b, i * b_next, b_type), b_type, ldb, turn_b}, keep,
                     {shifted(c, i * c_next, c_type), c_type, ldc, false});
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSgemmBatched(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n,
                                  int k, const float * alpha, const float * const a[], int lda,
                                  const float * const b[], int ldb, const float * beta, float * const c[], int ldc,
                                  int count) {
    return cublasGemmBatchedEx(handle, of_a, of_b, m, n, k, alpha, reinterpret_cast<const void * const *>(a),
                               CUDA_R_32F, lda, reinterpret_cast<const void * const *>(b), CUDA_R_32F, ldb, beta,
                               reinterpret_cast<void * const *>(c), CUDA_R_32F, ldc, count, CUBLAS_COMPUTE_32F,
                               CUBLAS_GEMM_DEFAULT);
}

cublasStatus_t cublasGemmBatchedEx(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m,
                                   int n, int k, const void * alpha, const void * const a[], cudaDataType a_type,
                                   int lda, const void * const b[], cudaDataType b_type, int ldb, const void * beta,
                                   void * const c[], cudaDataType c_type, int ldc, int count,
                                   cublasComputeType_t type, cublasGemmAlgo_t) {
    const float scale = scalar(alpha, type), keep = scalar(beta, type);
    const bool turn_a = transposed(of_a), turn_b = transposed(of_b);
    enqueue_kernel(handle->stream, "cublas", [=] {
        const Array as(a), bs(b);
        const Array cs(c);
        for (int i = 0; i < count; i++) {
            multiply(m, n, k, scale, {as[i], a_type, lda, turn_a}, {bs[i], b_type, ldb, turn_b}, keep,
                     {cs[i], c_type, ldc, false});
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasStrsmBatched(cublasHandle_t, cublasSideMode_t, cublasFillMode_t, cublasOperation_t,
                                  cublasDiagType_t, int, int, const float *, const float * const[], int,
                                  float * const[], int, int) {
    fault("triangular systems are not known here");
}

}  // extern "C"
