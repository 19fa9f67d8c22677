// Norms, activations, broadcasts, rotary embeddings and softmax, after norm.cu, unary.cu, binbcast.cu, scale.cu,
// rope.cu, softmax.cu and fwht.cu. Sums are of floats in the order of the columns.
#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels.h"

// Parameters that kernels take by value; the names are part of the kernels'.
struct soft_max_params {
    std::int64_t nheads;
    std::uint32_t n_head_log2;
    std::int64_t ncols, nrows_x, nrows_y, ne00, ne01, ne02, ne03, nb11, nb12, nb13, ne12, ne13;
    float scale, max_bias, m0, m1;
};

struct rope_corr_dims {
    float v[2];
};

namespace software_cuda {
namespace {

float silu(float x) { return x / (1.0f + std::exp(-x)); }

// rms_norm_f32<block size, multiply, add, scale>
const Family rms_norm("rms_norm_f32", [](const Templates & templates) {
    const bool multiply = templates[1] == "true", scaled = templates[3] == "true";
    if (templates[2] == "true") {
        return Kernel{};
    }
    return kernel([multiply, scaled](const Launch & launch, const float * x, float * dst, int columns, long row_stride,
                                     long channel_stride, long sample_stride, float epsilon, const float * mul,
                                     long mul_row_stride, long mul_channel_stride, long mul_sample_stride,
                                     uint3 mul_columns, uint3 mul_rows, uint3 mul_channels, uint3 mul_samples,
                                     const float *, long, long, long, uint3, uint3, uint3, uint3, float scale_out) {
        const Array input(x);
        const Array output(dst);
        for (unsigned sample = 0; sample < launch.grid.z; sample++) {
            for (unsigned channel = 0; channel < launch.grid.y; channel++) {
                for (unsigned row = 0; row < launch.grid.x; row++) {
                    const float * from =
                        input.run(sample * sample_stride + channel * channel_stride + row * row_stride, columns);
                    float * to = output.run(
                        ((long{sample} * launch.grid.y + channel) * launch.grid.x + row) * columns, columns);
                    float sum = 0;
                    for (int i = 0; i < columns; i++) {
                        sum += from[i] * from[i];
                    }
                    const float scale = (scaled ? scale_out : 1.0f) / std::sqrt(sum / columns + epsilon);
                    for (int i = 0; i < columns; i++) {
                        to[i] = scale * from[i];
                    }
                    if (multiply) {
                        const Array factors(mul);
                        const long first = sample % divisor(mul_samples) * mul_sample_stride +
                                           channel % divisor(mul_channels) * mul_channel_stride +
                                           row % divisor(mul_rows) * mul_row_stride;
                        for (int i = 0; i < columns; i++) {
                            to[i] *= factors[first + i % divisor(mul_columns)];
                        }
                    }
                }
            }
        }
    });
});

using Operation = float (*)(float, float);

Operation operation(const std::string & name) {
    const std::string word = between(name + "(", "op_", "(");
    if (word == "add") {
        return [](float a, float b) { return a + b; };
    }
    if (word == "mul") {
        return [](float a, float b) { return a * b; };
    }
    return nullptr;
}

struct Extent {
    unsigned size[4];
    std::size_t stride[4];
};

// dst[i] = op(src0[i], src1[i]), the sources repeated where they are smaller; with more sources op after op.
template <class A, class B, class C>
void broadcast(Operation op, const A * src0, const std::vector<const B *> & others, C * dst, const Extent & to,
               const Extent & first, const Extent & second) {
    const Array output(dst);
    const Array input(src0);
    for (unsigned i3 = 0; i3 < to.size[3]; i3++) {
        for (unsigned i2 = 0; i2 < to.size[2]; i2++) {
            for (unsigned i1 = 0; i1 < to.size[1]; i1++) {
                const auto start = [&](const Extent & of, bool repeated) {
                    const unsigned at[] = {i1, i2, i3};
                    std::size_t sum = 0;
                    for (int k = 1; k < 4; k++) {
                        sum += (repeated ? at[k - 1] % of.size[k] : at[k - 1]) * of.stride[k];
                    }
                    return sum;
                };
                for (unsigned i0 = 0; i0 < to.size[0]; i0++) {
                    float result = to_float(input[start(first, false) + i0 * first.stride[0]]);
                    for (const B * other : others) {
                        const std::size_t at = start(second, true) + i0 % second.size[0] * second.stride[0];
                        result = op(result, to_float(Array(other)[at]));
                    }
                    output[start(to, false) + i0] = from_float<C>(result);
                }
            }
        }
    }
}

template <class T, std::size_t> using Same = T;

template <std::size_t... I> Kernel bin_bcast(Operation op, bool unravelled, std::index_sequence<I...>) {
    const auto run = [op](const float * src0, const float * src1, float * dst, const Extent & to, const Extent & first,
                          const Extent & second, auto... more) {
        std::vector<const float *> others{more...};
        if (others.empty()) {
            others.push_back(src1);
        }
        broadcast(op, src0, others, dst, to, first, second);
    };
    if (unravelled) {
        return kernel([run](const Launch &, const float * src0, const float * src1, float * dst, uint3 ne0, uint3 ne1,
                            uint3 ne2, unsigned ne3, uint3, uint3, uint3 ne10, uint3 ne11, uint3 ne12, uint3 ne13,
                            unsigned s1, unsigned s2, unsigned s3, unsigned s00, unsigned s01, unsigned s02,
                            unsigned s03, unsigned s10, unsigned s11, unsigned s12, unsigned s13,
                            Same<const float *, I>... more) {
            run(src0, src1, dst, Extent{{ne0.z, ne1.z, ne2.z, ne3}, {1, s1, s2, s3}},
                Extent{{}, {s00, s01, s02, s03}}, Extent{{ne10.z, ne11.z, ne12.z, ne13.z}, {s10, s11, s12, s13}},
                more...);
        });
    }
    return kernel([run](const Launch &, const float * src0, const float * src1, float * dst, unsigned ne0,
                        unsigned ne1, unsigned ne2, uint3 ne3, uint3 ne10, uint3 ne11, uint3 ne12, uint3 ne13,
                        unsigned s1, unsigned s2, unsigned s3, unsigned s00, unsigned s01, unsigned s02, unsigned s03,
                        unsigned s10, unsigned s11, unsigned s12, unsigned s13, Same<const float *, I>... more) {
        run(src0, src1, dst, Extent{{ne0, ne1, ne2, ne3.z}, {1, s1, s2, s3}}, Extent{{}, {s00, s01, s02, s03}},
            Extent{{ne10.z, ne11.z, ne12.z, ne13.z}, {s10, s11, s12, s13}}, more...);
    });
}

// k_bin_bcast<operation, type of src0, of src1, of dst, type of each further source...>
Kernel make_bin_bcast(const Templates & templates, bool unravelled) {
    const Operation op = operation(templates[0]);
    if (op == nullptr || templates[1] != "float" || templates[2] != "float" || templates[3] != "float") {
        return {};
    }
    switch (templates.size() - 4) {
        case 0: return bin_bcast(op, unravelled, std::make_index_sequence<0>());
        case 1: return bin_bcast(op, unravelled, std::make_index_sequence<1>());
        case 2: return bin_bcast(op, unravelled, std::make_index_sequence<2>());
        default: return {};
    }
}

const Family bin_bcast_plain("k_bin_bcast", [](const Templates & templates) {
    return make_bin_bcast(templates, false);
});
const Family bin_bcast_unravel("k_bin_bcast_unravel", [](const Templates & templates) {
    return make_bin_bcast(templates, true);
});

// unary_gated_op_kernel<operation, type>
const Family gated("unary_gated_op_kernel", [](const Templates & templates) {
    if (templates[0].find("op_silu") == std::string::npos || templates[1] != "float") {
        return Kernel{};
    }
    return kernel([](const Launch &, const float * x, const float * g, float * dst, long count, long columns,
                     long x_stride, long g_stride) {
        const Array input(x), gate(g);
        const Array output(dst);
        for (long i = 0; i < count; i++) {
            const long row = i / columns, column = i % columns;
            output[i] = silu(input[row * x_stride + column]) * gate[row * g_stride + column];
        }
    });
});

const Family scale("scale_f32", [](const Templates & templates) {
    if (templates[0] != "float") {
        return Kernel{};
    }
    return kernel([](const Launch &, const float * x, float * dst, float scale, float bias, long count) {
        const float * from = Array(x).run(0, count);
        float * to = Array(dst).run(0, count);
        for (long i = 0; i < count; i++) {
            to[i] = scale * from[i] + bias;
        }
    });
});

// rope_neox<forward, factors, type of x, type of dst>
const Family rope_neox("rope_neox", [](const Templates & templates) {
    const bool forward = templates[0] == "true", factors = templates[1] == "true";
    if (templates[2] != "float") {
        return Kernel{};
    }
    return for_type(templates[3], [forward, factors](auto type) {
        using D = decltype(type);
        return kernel([forward, factors](const Launch & launch, const float * x, D * dst, int ne00, int ne01, int ne02,
                                         int s01, int s02, int s03, int s1, int s2, int s3, int dimensions, int offset,
                                         const int * positions, float freq_scale, float ext_factor, float attn_factor,
                                         rope_corr_dims corrections, float theta_scale, const float * freq_factors,
                                         const long * row_indices, int set_rows_stride, bool inplace) {
            const Array input(x);
            const Array output(dst);
            const Array position(positions);
            const long rows = long{launch.grid.x} * launch.block.x;
            for (long row = 0; row < rows; row++) {
                const long i3 = row / (ne01 * ne02), i2 = row / ne01 % ne02, i1 = row % ne01;
                const long from = i1 * s01 + i2 * s02 + i3 * s03;
                const long to = set_rows_stride != 0 ? i1 * s1 + Array(row_indices)[i2] * set_rows_stride
                                                     : i1 * s1 + i2 * s2 + i3 * s3;
                for (int i = 0; i < ne00; i++) {
                    if (!inplace && (i < offset || i >= offset + dimensions)) {
                        output[to + i] = from_float<D>(input[from + i]);
                    }
                }
                for (int pair = 0; pair < dimensions / 2; pair++) {
                    const float factor = factors ? Array(freq_factors)[pair] : 1.0f;
                    const float extrapolated =
                        static_cast<float>(position[i2]) * std::pow(theta_scale, static_cast<float>(pair)) / factor;
                    float theta = freq_scale * extrapolated, magnitude = attn_factor;
                    if (ext_factor != 0.0f) {
                        const float place = (static_cast<float>(pair) - corrections.v[0]) /
                                            std::max(0.001f, corrections.v[1] - corrections.v[0]);
                        const float mix = (1.0f - std::min(1.0f, std::max(0.0f, place))) * ext_factor;
                        theta = theta * (1 - mix) + extrapolated * mix;
                        magnitude *= 1.0f + 0.1f * std::log(1.0f / freq_scale);
                    }
                    const float cosine = std::cos(theta) * magnitude;
                    const float sine = std::sin(theta) * magnitude * (forward ? 1.0f : -1.0f);
                    const long first = from + offset + pair, second = first + dimensions / 2;
                    const float x0 = input[first], x1 = input[second];
                    output[to + offset + pair] = from_float<D>(x0 * cosine - x1 * sine);
                    output[to + offset + pair + dimensions / 2] = from_float<D>(x0 * sine + x1 * cosine);
                }
            }
        });
    });
});

// soft_max_f32<shared memory, columns, block size, type of the mask>
const Family soft_max("soft_max_f32", [](const Templates & templates) {
    return for_type(templates[3], [](auto type) {
        using T = decltype(type);
        return kernel([](const Launch & launch, const float * x, const T * mask, const float * sinks, float * dst,
                         soft_max_params p) {
            if (sinks != nullptr || p.max_bias > 0) {
                fault("softmax with sinks or ALiBi is not known here");
            }
            for (unsigned i3 = 0; i3 < launch.grid.z; i3++) {
                for (unsigned i2 = 0; i2 < launch.grid.y; i2++) {
                    for (unsigned i1 = 0; i1 < launch.grid.x; i1++) {
                        const long row = i1 + (i2 + long{i3} * launch.grid.y) * launch.grid.x;
                        const float * from = Array(x).run(row * p.ncols, p.ncols);
                        float * to = Array(dst).run(row * p.ncols, p.ncols);
                        const long masked =
                            (i1 * p.nb11 + i2 % p.ne12 * p.nb12 + i3 % p.ne13 * p.nb13) / long{sizeof(T)};
                        const T * hidden = mask != nullptr ? Array(mask).run(masked, p.ncols) : nullptr;
                        float largest = -INFINITY, sum = 0;
                        for (long i = 0; i < p.ncols; i++) {
                            to[i] = from[i] * p.scale + (hidden != nullptr ? to_float(hidden[i]) : 0.0f);
                            largest = std::max(largest, to[i]);
                        }
                        for (long i = 0; i < p.ncols; i++) {
                            to[i] = std::exp(to[i] - largest);
                            sum += to[i];
                        }
                        for (long i = 0; i < p.ncols; i++) {
                            to[i] /= sum;
                        }
                    }
                }
            }
        });
    });
});

// fwht_cuda<size, type>: Walsh-Hadamard transforms of rows
const Family fwht("fwht_cuda", [](const Templates & templates) {
    if (templates[1] != "float") {
        return Kernel{};
    }
    const long size = std::stol(templates[0]);
    return kernel([size](const Launch &, const float * src, float * dst, long rows, float scale) {
        for (long row = 0; row < rows; row++) {
            const float * from = Array(src).run(row * size, size);
            float * to = Array(dst).run(row * size, size);
            for (long i = 0; i < size; i++) {
                to[i] = from[i] * scale;
            }
            for (long half = 1; half < size; half *= 2) {
                for (long i = 0; i < size; i++) {
                    if ((i & half) == 0) {
                        const float a = to[i], b = to[i + half];
                        to[i] = a + b;
                        to[i + half] = a - b;
                    }
                }
            }
        }
    });
});

}  // namespace
}  // namespace software_cuda
