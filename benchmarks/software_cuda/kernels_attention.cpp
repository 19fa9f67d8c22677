// Flash attention, after fattn-common.cuh and the kernels that it launches. All of them have the same parameters; here
// each computes the attention of all its queries whole. What the real ones split over blocks and a second kernel puts
// together is one part here, the first, and that kernel is given parts of no weight for the rest.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace software_cuda {
namespace {

constexpr int kF16 = 1, kQ8 = 8;  // of enum ggml_type
constexpr int kQ8Block = 32;

// Numbers of a row of keys or values.
void load_row(const Array<const char> & from, long offset, int type, int count, float * to) {
    if (type == kF16) {
        const __half * row = reinterpret_cast<const __half *>(from.run(offset, count * sizeof(__half)));
        for (int i = 0; i < count; i++) {
            to[i] = to_float(row[i]);
        }
        return;
    }
    constexpr std::size_t kBytes = sizeof(__half) + kQ8Block;
    const char * row = from.run(offset, count / kQ8Block * kBytes);
    for (int i = 0; i < count; i++) {
        const char * block = row + i / kQ8Block * kBytes;
        to[i] = to_float(*reinterpret_cast<const __half *>(block)) *
                static_cast<float>(static_cast<signed char>(block[sizeof(__half) + i % kQ8Block]));
    }
}

// Kernels of parts, when there are several (`split`), write each part and its (maximum, sum).
Kernel attention(int size, int value_size, int key_type, int value_type, bool split) {
    if ((key_type != kF16 && key_type != kQ8) || (value_type != kF16 && value_type != kQ8)) {
        return {};
    }
    return kernel([=](const Launch & launch, const char * q, const char * k, const char * v, const char * mask,
                      const char * sinks, const int *, float * dst, float2 * meta, float scale, float max_bias, float,
                      float, unsigned, float softcap, int, uint3 ne01, int ne02, int ne03, int nb01, int nb02, int nb03,
                      int, int ne11, int ne12, int, int nb11, int nb12, long nb13, int nb21, int nb22, long nb23, int,
                      int, int ne33, int nb31, int, long nb33) {
        if (sinks != nullptr || max_bias > 0 || softcap != 0) {
            fault("attention with sinks, ALiBi or a soft cap is not known here");
        }
        const Array queries(q), keys(k), values(v);
        const long count = divisor(ne01), parts = split ? launch.grid.y : 1;
        std::vector<float> all_keys(static_cast<std::size_t>(ne11) * size);
        std::vector<float> all_values(static_cast<std::size_t>(ne11) * value_size), weights(ne11);
        for (long sequence = 0; sequence < ne03; sequence++) {
            for (long head = 0; head < ne02; head++) {
                const long kv_head = head / (ne02 / ne12);
                for (long i = 0; i < ne11; i++) {
                    load_row(keys, sequence * nb13 + kv_head * nb12 + i * nb11, key_type, size, &all_keys[i * size]);
                    load_row(values, sequence * nb23 + kv_head * nb22 + i * nb21, value_type, value_size,
                             &all_values[i * value_size]);
                }
                for (long j = 0; j < count; j++) {
                    const float * query = reinterpret_cast<const float *>(
                        queries.run(sequence * nb03 + head * nb02 + j * nb01, size * sizeof(float)));
                    const __half * hidden =
                        mask == nullptr
                            ? nullptr
                            : reinterpret_cast<const __half *>(
                                  Array(mask).run(sequence % ne33 * nb33 + j * nb31, ne11 * sizeof(__half)));
                    float largest = -INFINITY, sum = 0;
                    for (long i = 0; i < ne11; i++) {
                        const float masked = hidden == nullptr ? 0.0f : to_float(hidden[i]);
                        float score = 0;
                        for (int d = 0; masked != -INFINITY && d < size; d++) {
                            score += query[d] * all_keys[i * size + d];
                        }
                        weights[i] = score * scale + masked;
                        largest = std::max(largest, weights[i]);
                    }
                    const long row = (sequence * count + j) * ne02 + head;
                    float * to = Array(dst).run(row * parts * value_size, parts * value_size);
                    std::fill(to, to + parts * value_size, 0.0f);
                    for (long i = 0; i < ne11; i++) {
                        const float weight = std::exp(weights[i] - largest);
                        sum += weight;
                        for (int d = 0; weight > 0 && d < value_size; d++) {
                            to[d] += weight * all_values[i * value_size + d];
                        }
                    }
                    if (parts > 1) {
                        float2 * described = Array(meta).run(row * parts, parts);
                        std::fill(described, described + parts, float2{-INFINITY, 0.0f});
                        described[0] = {largest, sum};
                    } else {
                        for (int d = 0; d < value_size; d++) {
                            to[d] /= sum;
                        }
                    }
                }
            }
        }
    });
}

// flash_attn_ext_f16<size, size of values, queries, heads, soft cap, values are keys, sparse>
const Family tensor_cores("flash_attn_ext_f16", [](const Templates & templates) {
    if (templates[4] == "true" || templates[5] == "true" || templates[6] == "true") {
        return Kernel{};
    }
    return attention(std::stoi(templates[0]), std::stoi(templates[1]), kF16, kF16, false);
});

// flash_attn_tile<size, size of values, queries, heads, soft cap>
const Family tiles("flash_attn_tile", [](const Templates & templates) {
    return templates[4] == "true" ? Kernel{}
                                  : attention(std::stoi(templates[0]), std::stoi(templates[1]), kF16, kF16, true);
});

// flash_attn_ext_vec<size, queries, type of keys, type of values, soft cap>
const Family vectors("flash_attn_ext_vec", [](const Templates & templates) {
    const int size = std::stoi(templates[0]);
    return templates[4] == "true"
               ? Kernel{}
               : attention(size, size, enumerator(templates[2]), enumerator(templates[3]), true);
});

// flash_attn_combine_results<size>
const Family combine("flash_attn_combine_results", [](const Templates & templates) {
    const long size = std::stol(templates[0]);
    return kernel([size](const Launch & launch, const float * parts, const float2 * meta, float * dst, int count) {
        const long rows = long{launch.grid.x} * launch.grid.y * launch.grid.z;
        for (long row = 0; row < rows; row++) {
            const float * from = Array(parts).run(row * count * size, count * size);
            const float2 * described = Array(meta).run(row * count, count);
            float * to = Array(dst).run(row * size, size);
            float largest = -INFINITY;
            for (int part = 0; part < count; part++) {
                largest = std::max(largest, described[part].x);
            }
            for (long d = 0; d < size; d++) {
                float numerator = 0, denominator = 0;
                for (int part = 0; part < count; part++) {
                    const float weight = std::exp(described[part].x - largest);
                    numerator += weight * from[part * size + d];
                    denominator += weight * described[part].y;
                }
                to[d] = numerator / denominator;
            }
        }
    });
});

// What finds the last key that is not hidden, to save work, and what repairs tiles that lie across blocks.
const Family last_key("flash_attn_mask_to_KV_max", [](const Templates &) {
    return kernel([](const Launch &, const __half2 *, int *, int, long, long) {});
});
const Family uniform("flash_attn_stream_k_fixup_uniform", [](const Templates &) {
    return kernel([](const Launch &, float *, const float2 *, int, int, int, int, int, int, uint3, uint3, uint3) {});
});
const Family general("flash_attn_stream_k_fixup_general", [](const Templates &) {
    return kernel([](const Launch &, float *, const float2 *, int, int, int, int, uint3, uint3, uint3, uint3) {});
});

}  // namespace
}  // namespace software_cuda
