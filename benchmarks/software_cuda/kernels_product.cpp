// Products with few columns, which ggml computes itself, after mmvf.cu and mmf.cuh. Sums are of floats.
#include "fusion.h"
#include "kernels.h"

namespace software_cuda {
namespace {

template <class T> float dot(const T * row, const float * column, long count) {
    float sum = 0;
    for (long i = 0; i < count; i++) {
        sum += to_float(row[i]) * column[i];
    }
    return sum;
}

// mul_mat_vec_f<type, type of the sums, columns, block size, fusion, several tokens of experts>
const Family mul_mat_vec("mul_mat_vec_f", [](const Templates & templates) {
    const int columns = std::stoi(templates[2]);
    const bool fused = templates[4] == "true";
    if (templates[5] == "true") {
        return Kernel{};
    }
    return for_type(templates[0], [columns, fused](auto type) {
        using T = decltype(type);
        return kernel([columns, fused](const Launch & launch, const T * x, const float * y, const int * ids,
                                       ggml_cuda_mm_fusion_args_device fusion, float * dst, int pairs, uint3,
                                       int row_stride, int y_column_stride, int dst_column_stride, uint3 channel_ratio,
                                       int x_channel_stride, int y_channel_stride, int dst_channel_stride,
                                       uint3 sample_ratio, int x_sample_stride, int y_sample_stride,
                                       int dst_sample_stride, int) {
            const bool gated = fused && fusion.gate != nullptr;
            check(fusion, ids, fused);
            const Array weights(x), gates(gated ? static_cast<const T *>(fusion.gate) : x);
            const Array inputs(y);
            const Array output(dst);
            const long length = 2 * long{pairs};
            for (long sample = 0; sample < launch.grid.z; sample++) {
                for (long channel = 0; channel < launch.grid.y; channel++) {
                    for (long row = 0; row < launch.grid.x; row++) {
                        const long at = sample / divisor(sample_ratio) * x_sample_stride +
                                        channel / divisor(channel_ratio) * x_channel_stride + row * row_stride;
                        for (long j = 0; j < columns; j++) {
                            const float * column = inputs.run(
                                sample * y_sample_stride + channel * y_channel_stride + 2 * j * y_column_stride,
                                length);
                            const long to = sample * dst_sample_stride + channel * dst_channel_stride +
                                            j * dst_column_stride + row;
                            const float gate = gated ? dot(gates.run(at, length), column, length) : 0.0f;
                            const float value = dot(weights.run(at, length), column, length);
                            output[to] = fused ? finished(fusion, value, gate, to) : value;
                        }
                    }
                }
            }
        });
    });
});

// mul_mat_f<type, rows of a block, columns, warps, experts>; of halves the type is a pair, and x is counted in pairs.
const Family mul_mat("mul_mat_f", [](const Templates & templates) {
    const int rows = std::stoi(templates[1]), columns = std::stoi(templates[2]);
    if (templates[4] == "true") {
        return Kernel{};
    }
    const auto make = [rows, columns](auto element, auto packed) {
        using T = decltype(element);
        using P = decltype(packed);
        constexpr long kPack = sizeof(P) / sizeof(T);
        return kernel([rows, columns](const Launch & launch, const P * x, const float * y, const int * ids, float * dst,
                                      int length, int, int, int row_stride, int y_column_stride, int dst_column_stride,
                                      int, int, int channel_ratio, int x_channel_stride, int y_channel_stride,
                                      int dst_channel_stride, int sample_ratio, int x_sample_stride,
                                      int y_sample_stride, int dst_sample_stride) {
            if (ids != nullptr) {
                fault("products of experts are not known here");
            }
            const Array weights(reinterpret_cast<const T *>(x));
            const Array inputs(y);
            const Array output(dst);
            const long count = kPack * length;
            for (long sample = 0; sample < launch.grid.z; sample++) {
                for (long channel = 0; channel < launch.grid.y; channel++) {
                    for (long row = 0; row < long{launch.grid.x} * rows; row++) {
                        const T * values = weights.run(
                            kPack * (sample / sample_ratio * x_sample_stride +
                                     channel / channel_ratio * x_channel_stride + row * row_stride),
                            count);
                        for (long j = 0; j < columns; j++) {
                            const long from = sample * y_sample_stride + channel * y_channel_stride;
                            output[sample * dst_sample_stride + channel * dst_channel_stride + j * dst_column_stride +
                                   row] = dot(values, inputs.run(from + kPack * j * y_column_stride, count), count);
                        }
                    }
                }
            }
        });
    };
    return templates[0] == "float"     ? make(float{}, float{})
           : templates[0] == "__half2" ? make(__half{}, __half2{})
                                       : Kernel{};
});

}  // namespace
}  // namespace software_cuda
