// What the calls of the runtime share.
#pragma once

#include <cuda_runtime_api.h>

namespace software_cuda {

// Keeps an error for cudaGetLastError, and gives it back.
cudaError_t failed(cudaError_t error);

}  // namespace software_cuda
