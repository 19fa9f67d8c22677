// Products with quantised weights and KV cells in Q8_0, after quantize.cu, mmvq.cu, mmq.cuh, set-rows.cu and
// convert.cu. Activations are rounded to eight bits in ggml's own layouts; weights are read by ggml's own function
// (`to_float`), of whatever type they are.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>

#include "fusion.h"
#include "kernels.h"

// Of ggml-common.h; the name is part of the kernels'.
struct block_q8_0 {
    __half d;
    signed char qs[32];
};

namespace software_cuda {
namespace {

constexpr int kBlock = 32;

// The beginning of ggml.h's struct ggml_type_traits.
struct TypeTraits {
    const char * name;
    std::int64_t block, interleave;
    std::size_t bytes;
    bool quantised;
    void (*to_float)(const void * from, float * to, std::int64_t count);
};

const TypeTraits & traits(int type) {
    using Get = const TypeTraits * (*)(int);
    static const auto get = [] {
        void * ggml = dlopen("libggml-base.so.0", RTLD_LAZY | RTLD_NOLOAD);
        void * found = ggml != nullptr ? dlsym(ggml, "ggml_get_type_traits") : nullptr;
        if (found == nullptr) {
            fault("ggml's types cannot be asked for");
        }
        return reinterpret_cast<Get>(found);
    }();
    return *get(type);
}

// A scale and its numbers, for 32 values or as many as have the same scale.
void round_to_eight_bits(const float * from, int count, float & scale, signed char * to) {
    float largest = 0;
    for (int i = 0; i < count; i++) {
        largest = std::max(largest, std::fabs(from[i]));
    }
    scale = largest / 127.0f;
    for (int i = 0; i < count; i++) {
        to[i] = largest == 0 ? 0 : static_cast<signed char>(std::round(from[i] / scale));
    }
}

float sum_of(const float * from, int count) {
    float sum = 0;
    for (int i = 0; i < count; i++) {
        sum += from[i];
    }
    return sum;
}

// block_q8_1: 32 values, their scale and their sum.
struct Q8 {
    __half scale, sum;
    signed char values[kBlock];
};

const Family quantize_q8_1("quantize_q8_1", [](const Templates &) {
    return kernel([](const Launch & launch, const float * x, void * y, long columns, long s01, long s02, long s03,
                     long padded, unsigned ne1, uint3 ne2) {
        const Array input(x);
        const Array output(static_cast<Q8 *>(y));
        for (long z = 0; z < launch.grid.z; z++) {
            for (long row = 0; row < launch.grid.y; row++) {
                const float * from =
                    input.run(z / divisor(ne2) * s03 + z % divisor(ne2) * s02 + row * s01, columns);
                for (long i = 0; i < padded; i += kBlock) {
                    float values[kBlock] = {}, scale;
                    std::copy(from + std::min(i, columns), from + std::min(i + kBlock, columns), values);
                    Q8 & block = output[((z * ne1 + row) * padded + i) / kBlock];
                    round_to_eight_bits(values, kBlock, scale, block.values);
                    block.scale = from_float<__half>(scale);
                    block.sum = from_float<__half>(sum_of(values, kBlock));
                }
            }
        }
    });
});

// mul_mat_vec_q<type, columns, fusion, ...>
const Family mul_mat_vec_q("mul_mat_vec_q", [](const Templates & templates) {
    const int type = enumerator(templates[0]), columns = std::stoi(templates[1]);
    const bool fused = templates[2] == "true";
    return kernel([type, columns, fused](const Launch & launch, const void * x, const void * y, const int * ids,
                                         ggml_cuda_mm_fusion_args_device fusion, float * dst, unsigned length, uint3,
                                         unsigned row_stride, unsigned y_column_stride, unsigned dst_column_stride,
                                         uint3 channel_ratio, unsigned x_channel_stride, unsigned y_channel_stride,
                                         unsigned dst_channel_stride, uint3 sample_ratio, unsigned x_sample_stride,
                                         unsigned y_sample_stride, unsigned dst_sample_stride, unsigned) {
        check(fusion, ids, fused);
        const TypeTraits & of = traits(type);
        const bool gated = fused && fusion.gate != nullptr;
        const Array weights(static_cast<const char *>(x)), gates(static_cast<const char *>(gated ? fusion.gate : x));
        const Array inputs(static_cast<const Q8 *>(y));
        const Array output(dst);
        std::vector<float> row_values(length), gate_values(length), column_values(std::size_t{length} * columns);
        const std::size_t row_bytes = length / of.block * of.bytes;
        for (long sample = 0; sample < launch.grid.z; sample++) {
            for (long channel = 0; channel < launch.grid.y; channel++) {
                for (long j = 0; j < columns; j++) {
                    const Q8 * blocks =
                        inputs.run(sample * y_sample_stride + channel * y_channel_stride + j * y_column_stride,
                                   length / kBlock);
                    for (unsigned i = 0; i < length; i++) {
                        column_values[j * length + i] =
                            to_float(blocks[i / kBlock].scale) * blocks[i / kBlock].values[i % kBlock];
                    }
                }
                // The grid covers the rows in groups; those of dst follow each other.
                for (long row = 0; row < dst_column_stride; row++) {
                    const long at = sample / divisor(sample_ratio) * x_sample_stride +
                                    channel / divisor(channel_ratio) * x_channel_stride + row * row_stride;
                    of.to_float(weights.run(at * of.bytes, row_bytes), row_values.data(), length);
                    if (gated) {
                        of.to_float(gates.run(at * of.bytes, row_bytes), gate_values.data(), length);
                    }
                    for (long j = 0; j < columns; j++) {
                        const float * column = &column_values[j * length];
                        float value = 0, gate = 0;
                        for (unsigned i = 0; i < length; i++) {
                            value += row_values[i] * column[i];
                            gate += gated ? gate_values[i] * column[i] : 0.0f;
                        }
                        const long to =
                            sample * dst_sample_stride + channel * dst_channel_stride + j * dst_column_stride + row;
                        output[to] = fused ? finished(fusion, value, gate, to) : value;
                    }
                }
            }
        }
    });
});

// block_q8_1_mmq: 128 values, and scales and sums as the type of the weights needs them.
enum Layout { kScales, kScalesAndSums, kScalesOf64AndSumsOf16 };

struct Q8Wide {
    unsigned char described[16];
    signed char values[4 * kBlock];

    float scale(Layout layout, int at) const {
        if (layout == kScales) {
            float value;
            std::memcpy(&value, described + at / kBlock * sizeof value, sizeof value);
            return value;
        }
        __half_raw value;
        std::memcpy(&value.x, described + (layout == kScalesAndSums ? at / kBlock * 4 : at / 64 * 2), sizeof value.x);
        return to_float(value);
    }

    void put_half(int place, float value) {
        const __half_raw half = from_float<__half>(value);
        std::memcpy(described + place * sizeof half.x, &half.x, sizeof half.x);
    }

    void fill(Layout layout, const float * from) {
        const int step = layout == kScalesOf64AndSumsOf16 ? 64 : kBlock;
        for (int i = 0; i < 4 * kBlock; i += step) {
            float scale;
            round_to_eight_bits(from + i, step, scale, values + i);
            if (layout == kScales) {
                std::memcpy(described + i / kBlock * sizeof scale, &scale, sizeof scale);
            } else {
                put_half(layout == kScalesAndSums ? i / kBlock * 2 : i / step, scale);
            }
            if (layout == kScalesAndSums) {
                put_half(i / kBlock * 2 + 1, sum_of(from + i, kBlock));
            }
        }
        for (int i = 0; layout == kScalesOf64AndSumsOf16 && i < 96; i += 16) {
            put_half(2 + i / 16, sum_of(from + i, 16));
        }
    }
};

// mmq_get_q8_1_ds_layout, by the name of the type
Layout layout_for(const std::string & type) {
    if (type == "q2_K") {
        return kScalesOf64AndSumsOf16;
    }
    const bool sums = type == "q4_0" || type == "q4_1" || type == "q5_1" || type == "q4_K" || type == "q5_K" ||
                      type == "iq1_s";
    return sums ? kScalesAndSums : kScales;
}

// quantize_mmq_q8_1<layout, scatter>
const Family quantize_mmq("quantize_mmq_q8_1", [](const Templates & templates) {
    const auto layout = static_cast<Layout>(enumerator(templates[0]));
    if (templates[1] == "true") {
        return Kernel{};
    }
    return kernel([layout](const Launch & launch, const float * x, const int * ids, void * y, long columns, long s01,
                           long s02, long s03, long padded, int ne1, int ne2, int) {
        if (ids != nullptr) {
            fault("products of experts are not known here");
        }
        const Array input(x);
        const Array output(static_cast<Q8Wide *>(y));
        const long channel_blocks = long{launch.grid.x} * launch.grid.y * launch.block.x / kBlock;
        for (long z = 0; z < launch.grid.z; z++) {
            for (long row = 0; row < launch.grid.x; row++) {
                const float * from = input.run(z / ne2 * s03 + z % ne2 * s02 + row * s01, columns);
                for (long i = 0; i < padded; i += 4 * kBlock) {
                    float values[4 * kBlock] = {};
                    std::copy(from + std::min(i, columns), from + std::min(i + 4 * kBlock, columns), values);
                    output[z * channel_blocks + i / (4 * kBlock) * ne1 + row].fill(layout, values);
                }
            }
        }
    });
});

// mul_mat_q<type, columns of a tile, fallback, precision>
const Family mul_mat_q("mul_mat_q", [](const Templates & templates) {
    const int type = enumerator(templates[0]);
    return kernel([type](const Launch &, const char * x, const int * y, const int * ids, const int *, float * dst,
                         float *, const float *, uint3 blocks_per_row, int rows, int columns, int row_stride, int ne1,
                         int dst_column_stride, uint3 channel_ratio, uint3 channels, int x_channel_stride,
                         int y_channel_stride, int dst_channel_stride, uint3 sample_ratio, uint3 samples,
                         int x_sample_stride, int y_sample_stride, int dst_sample_stride, uint3) {
        if (ids != nullptr) {
            fault("products of experts are not known here");
        }
        const TypeTraits & of = traits(type);
        const Layout layout = layout_for(of.name);
        const long length = divisor(blocks_per_row) * of.block;
        const Array weights(x);
        const Array output(dst);
        std::vector<float> row_values(length), column_values(static_cast<std::size_t>(length) * columns);
        for (long sample = 0; sample < divisor(samples); sample++) {
            for (long channel = 0; channel < divisor(channels); channel++) {
                const Array inputs(
                    reinterpret_cast<const Q8Wide *>(y + sample * y_sample_stride + channel * y_channel_stride));
                for (long j = 0; j < columns; j++) {
                    for (long i = 0; i < length; i++) {
                        const Q8Wide & block = inputs[i / (4 * kBlock) * ne1 + j];
                        const int at = static_cast<int>(i % (4 * kBlock));
                        column_values[j * length + i] = block.scale(layout, at) * block.values[at];
                    }
                }
                for (long row = 0; row < rows; row++) {
                    const long at = sample / divisor(sample_ratio) * x_sample_stride +
                                    channel / divisor(channel_ratio) * x_channel_stride + row * row_stride;
                    of.to_float(weights.run(at * of.bytes, divisor(blocks_per_row) * of.bytes), row_values.data(),
                                length);
                    for (long j = 0; j < columns; j++) {
                        const float * column = &column_values[j * length];
                        float value = 0;
                        for (long i = 0; i < length; i++) {
                            value += row_values[i] * column[i];
                        }
                        output[sample * dst_sample_stride + channel * dst_channel_stride + j * dst_column_stride +
                               row] = value;
                    }
                }
            }
        }
    });
});

// What repairs tiles that lie across blocks; here none does.
const Family fixup("mul_mat_q_stream_k_fixup", [](const Templates &) {
    return kernel([](const Launch &, const int *, const int *, float *, float *, uint3, int, int, int, uint3, int,
                     uint3, int, uint3) {});
});

// k_set_rows_quant<type of the indices, block, values of a block, function>
const Family set_rows("k_set_rows_quant", [](const Templates & templates) {
    if (templates[0] != "long" || templates[1] != "block_q8_0") {
        return Kernel{};
    }
    return kernel([](const Launch &, const float * src0, const long * src1, block_q8_0 * dst, long count, long, long,
                     long, long, long s01, long s02, long s03, long s10, long s11, long s12, long s1, long s2, long s3,
                     uint3 ne00, uint3 ne01, uint3 ne02, uint3 ne11, uint3 ne12) {
        const Array source(src0);
        const Array indices(src1);
        const Array target(dst);
        for (long block = 0; block < count; block++) {
            const long i = block * kBlock, i00 = i % divisor(ne00), row = i / divisor(ne00);
            const long i01 = row % divisor(ne01), i02 = row / divisor(ne01) % divisor(ne02);
            const long i03 = row / divisor(ne01) / divisor(ne02);
            const long to_row = indices[i01 * s10 + i02 % divisor(ne11) * s11 + i03 % divisor(ne12) * s12];
            block_q8_0 & to = target[(to_row * s1 + i02 * s2 + i03 * s3) / long{sizeof(block_q8_0)} + i00 / kBlock];
            float scale;
            round_to_eight_bits(source.run(i01 * s01 + i02 * s02 + i03 * s03 + i00, kBlock), kBlock, scale, to.qs);
            to.d = from_float<__half>(scale);
        }
    });
});

float value_of(const block_q8_0 & block, long at) { return to_float(block.d) * block.qs[at]; }

const Family dequantize_q8_0("dequantize_block_q8_0_f16", [](const Templates &) {
    return kernel([](const Launch &, const void * x, __half * y, long count) {
        const block_q8_0 * from = Array(static_cast<const block_q8_0 *>(x)).run(0, count / kBlock);
        __half * to = Array(y).run(0, count);
        for (long i = 0; i < count; i++) {
            to[i] = from_float<__half>(value_of(from[i / kBlock], i % kBlock));
        }
    });
});

// dequantize_block<values of a block, numbers of a byte, function, type of y>
const Family dequantize("dequantize_block", [](const Templates & templates) {
    if (templates[2].find("dequantize_q8_0") == std::string::npos) {
        return Kernel{};
    }
    return for_type(templates[3], [](auto type) {
        using D = decltype(type);
        return kernel([](const Launch &, const void * x, D * y, long ne00, long ne01, long ne0203, uint3 ne02, long s01,
                         long s02, long s03) {
            const Array from(static_cast<const block_q8_0 *>(x));
            for (long i23 = 0; i23 < ne0203; i23++) {
                for (long i01 = 0; i01 < ne01; i01++) {
                    const block_q8_0 * row =
                        from.run(i23 / divisor(ne02) * s03 + i23 % divisor(ne02) * s02 + i01 * s01, ne00 / kBlock);
                    D * to = Array(y).run((i23 * ne01 + i01) * ne00, ne00);
                    for (long i = 0; i < ne00; i++) {
                        to[i] = from_float<D>(value_of(row[i / kBlock], i % kBlock));
                    }
                }
            }
        });
    });
});

}  // namespace
}  // namespace software_cuda
