// What ggml's products with few columns do beside multiplying: add a bias, and gate with a second product.
#pragma once

#include <cmath>

#include "kernels.h"

// Of ggml.h and common.cuh; the names are part of the kernels'.
enum ggml_glu_op : int {};

struct ggml_cuda_mm_fusion_args_device {
    const void * x_bias;
    const void * gate;
    const void * gate_bias;
    const void * x_scale;
    const void * gate_scale;
    ggml_glu_op glu_op;
    float glu_limit;
};

namespace software_cuda {

constexpr int kSwiglu = 2;

inline void check(const ggml_cuda_mm_fusion_args_device & fusion, const int * ids, bool fused) {
    if (ids != nullptr || (fused && (fusion.x_scale != nullptr || fusion.gate_scale != nullptr)) ||
        (fused && fusion.gate != nullptr && fusion.glu_op != kSwiglu)) {
        fault("products of experts, with scales, or with a gate but for SwiGLU, are not known here");
    }
}

// The element `at` of the result.
inline float finished(const ggml_cuda_mm_fusion_args_device & fusion, float value, float gate, long at) {
    const auto bias = [at](const void * of) {
        return of == nullptr ? 0.0f : Array(static_cast<const float *>(of))[at];
    };
    value += bias(fusion.x_bias);
    if (fusion.gate == nullptr) {
        return value;
    }
    gate += bias(fusion.gate_bias);
    return value * gate / (1.0f + std::exp(-gate));
}

}  // namespace software_cuda
