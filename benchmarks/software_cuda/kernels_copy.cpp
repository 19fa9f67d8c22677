// Rows taken and set, copies between layouts and types, after getrows.cu, set-rows.cu, cpy.cu, convert.cu and
// ggml-cuda.cu.
#include <utility>

#include "kernels.h"

namespace software_cuda {
namespace {

// A kernel for two element types by name.
template <class F> Kernel for_types(const std::string & first, const std::string & second, F make) {
    return for_type(first, [&](auto one) {
        return for_type(second, [&](auto other) { return make(one, other); });
    });
}

// k_get_rows_float<type of src0, type of dst>
const Family get_rows("k_get_rows_float", [](const Templates & templates) {
    return for_types(templates[0], templates[1], [](auto from, auto to) {
        using S = decltype(from);
        using D = decltype(to);
        return kernel([](const Launch & launch, const S * src0, const int * src1, D * dst, long columns, long ne11,
                         uint3 ne12, unsigned long s1, unsigned long s2, unsigned long s3, unsigned long nb01,
                         unsigned long nb02, unsigned long nb03, unsigned long s10, unsigned long s11,
                         unsigned long s12) {
            const Array indices(src1);
            const Array table(reinterpret_cast<const char *>(src0));
            for (long z = 0; z < ne11 * divisor(ne12); z++) {
                const long i11 = z / divisor(ne12), i12 = z % divisor(ne12);
                for (long i10 = 0; i10 < launch.grid.x; i10++) {
                    const long row = indices[i10 * s10 + i11 * s11 + i12 * s12];
                    D * target = Array(dst).run(i10 * s1 + i11 * s2 + i12 * s3, columns);
                    const S * source = reinterpret_cast<const S *>(
                        table.run(row * nb01 + i11 * nb02 + i12 * nb03, columns * sizeof(S)));
                    for (long i = 0; i < columns; i++) {
                        target[i] = from_float<D>(to_float(source[i]));
                    }
                }
            }
        });
    });
});

// k_get_rows_float_vec<type>: sixteen bytes at a time
const Family get_rows_vec("k_get_rows_float_vec", [](const Templates & templates) {
    return for_type(templates[0], [](auto type) {
        using T = decltype(type);
        return kernel([](const Launch & launch, const T * src0, const int * src1, T * dst, long vectors, long ne11,
                         uint3 ne12, unsigned long s1, unsigned long s2, unsigned long s3, unsigned long nb01,
                         unsigned long nb02, unsigned long nb03, unsigned long s10, unsigned long s11,
                         unsigned long s12) {
            const Array indices(src1);
            const Array table(reinterpret_cast<const char *>(src0));
            const std::size_t bytes = static_cast<std::size_t>(vectors) * sizeof(int4);
            for (long z = 0; z < ne11 * divisor(ne12); z++) {
                const long i11 = z / divisor(ne12), i12 = z % divisor(ne12);
                for (long i10 = 0; i10 < launch.grid.x; i10++) {
                    const long row = indices[i10 * s10 + i11 * s11 + i12 * s12];
                    T * target = Array(dst).run(i10 * s1 + i11 * s2 + i12 * s3, bytes / sizeof(T));
                    std::memcpy(static_cast<void *>(target),
                                table.run(row * nb01 + i11 * nb02 + i12 * nb03, bytes), bytes);
                }
            }
        });
    });
});

// k_set_rows<type of src0, type of the indices, type of dst>
template <class I> Kernel set_rows(const std::string & type) {
    return for_type(type, [](auto to) {
        using D = decltype(to);
        return kernel([](const Launch &, const float * src0, const I * src1, D * dst, long count, long, long, long,
                         long, long s01, long s02, long s03, long s10, long s11, long s12, long s1, long s2, long s3,
                         uint3 ne00, uint3 ne01, uint3 ne02, uint3 ne11, uint3 ne12) {
            const Array source(src0);
            const Array indices(src1);
            const Array target(dst);
            for (long i = 0; i < count; i++) {
                const long i00 = i % divisor(ne00), row = i / divisor(ne00);
                const long i01 = row % divisor(ne01), i02 = row / divisor(ne01) % divisor(ne02);
                const long i03 = row / divisor(ne01) / divisor(ne02);
                const long to_row =
                    static_cast<long>(indices[i01 * s10 + i02 % divisor(ne11) * s11 + i03 % divisor(ne12) * s12]);
                target[to_row * s1 + i02 * s2 + i03 * s3 + i00] =
                    from_float<D>(source[i01 * s01 + i02 * s02 + i03 * s03 + i00]);
            }
        });
    });
}

const Family set_rows_float("k_set_rows", [](const Templates & templates) {
    if (templates[0] != "float") {
        return Kernel{};
    }
    return templates[1] == "long" ? set_rows<long>(templates[2])
           : templates[1] == "int" ? set_rows<int>(templates[2])
                                   : Kernel{};
});

// cpy_scalar<&cpy_1_scalar<type of src, type of dst>>
const Family cpy("cpy_scalar", [](const Templates & templates) {
    const Templates types = split(between(templates[0], "cpy_1_scalar<", ">"));
    if (types.size() != 2) {
        return Kernel{};
    }
    return for_types(types[0], types[1], [](auto from, auto to) {
        using S = decltype(from);
        using D = decltype(to);
        return kernel([](const Launch &, const char * src, char * dst, long count, long ne00, long ne01, long ne02,
                         long nb00, long nb01, long nb02, long nb03, long ne10, long ne11, long ne12, long nb10,
                         long nb11, long nb12, long nb13) {
            const Array source(src);
            const Array target(dst);
            for (long i = 0; i < count; i++) {
                const long s = i % ne00 * nb00 + i / ne00 % ne01 * nb01 + i / (ne00 * ne01) % ne02 * nb02 +
                               i / (ne00 * ne01 * ne02) * nb03;
                const long d = i % ne10 * nb10 + i / ne10 % ne11 * nb11 + i / (ne10 * ne11) % ne12 * nb12 +
                               i / (ne10 * ne11 * ne12) * nb13;
                const S * value = reinterpret_cast<const S *>(source.run(s, sizeof(S)));
                *reinterpret_cast<D *>(target.run(d, sizeof(D))) = from_float<D>(to_float(*value));
            }
        });
    });
});

// cpy_scalar_contiguous<type of src, type of dst>
const Family cpy_contiguous("cpy_scalar_contiguous", [](const Templates & templates) {
    return for_types(templates[0], templates[1], [](auto from, auto to) {
        using S = decltype(from);
        using D = decltype(to);
        return kernel([](const Launch &, const char * src, char * dst, long count) {
            const S * source = Array(reinterpret_cast<const S *>(src)).run(0, count);
            D * target = Array(reinterpret_cast<D *>(dst)).run(0, count);
            for (long i = 0; i < count; i++) {
                target[i] = from_float<D>(to_float(source[i]));
            }
        });
    });
});

// cpy_scalar_transpose<type>: each matrix of ne00 rows of ne01 becomes one of ne01 rows of ne00
const Family cpy_transpose("cpy_scalar_transpose", [](const Templates & templates) {
    return for_type(templates[0], [](auto type) {
        using T = decltype(type);
        return kernel([](const Launch &, const char * src, char * dst, long count, long ne00, long ne01, long, long,
                         long, long, long, long, long, long, long, long, long, long) {
            const T * source = Array(reinterpret_cast<const T *>(src)).run(0, count);
            T * target = Array(reinterpret_cast<T *>(dst)).run(0, count);
            for (long i = 0; i < count; i++) {
                const long matrix = i / (ne00 * ne01), row = i / ne00 % ne01, column = i % ne00;
                target[i] = source[matrix * ne00 * ne01 + column * ne01 + row];
            }
        });
    });
});

// convert_unary<type of x, type of y>
const Family convert("convert_unary", [](const Templates & templates) {
    return for_types(templates[0], templates[1], [](auto from, auto to) {
        using S = decltype(from);
        using D = decltype(to);
        return kernel([](const Launch &, const void * x, D * y, long ne00, long ne01, long ne0203, uint3 ne02, long s01,
                         long s02, long s03) {
            const Array source(static_cast<const S *>(x));
            for (long i23 = 0; i23 < ne0203; i23++) {
                for (long i01 = 0; i01 < ne01; i01++) {
                    const S * row =
                        source.run(i23 / divisor(ne02) * s03 + i23 % divisor(ne02) * s02 + i01 * s01, ne00);
                    D * target = Array(y).run((i23 * ne01 + i01) * ne00, ne00);
                    for (long i = 0; i < ne00; i++) {
                        target[i] = from_float<D>(to_float(row[i]));
                    }
                }
            }
        });
    });
});

// convert_unary_cont_vec4<type of x, type of y>
const Family convert_vec4("convert_unary_cont_vec4", [](const Templates & templates) {
    return for_types(templates[0], templates[1], [](auto from, auto to) {
        using S = decltype(from);
        using D = decltype(to);
        return kernel([](const Launch &, const void * x, D * y, long fours) {
            const S * source = Array(static_cast<const S *>(x)).run(0, 4 * fours);
            D * target = Array(y).run(0, 4 * fours);
            for (long i = 0; i < 4 * fours; i++) {
                target[i] = from_float<D>(to_float(source[i]));
            }
        });
    });
});

const Family pointers("k_compute_batched_ptrs", [](const Templates &) {
    return kernel([](const Launch &, const void * src0, const void * src1, char * dst, const void ** sources,
                     void ** targets, long ne12, long ne13, long ne23, unsigned long nb02, unsigned long nb03,
                     unsigned long nb12, unsigned long nb13, unsigned long nbd2, unsigned long nbd3, long r2, long r3) {
        const Array from(sources);
        const Array to(targets);
        for (long i13 = 0; i13 < ne13; i13++) {
            for (long i12 = 0; i12 < ne12; i12++) {
                const long at = i12 + i13 * ne12;
                from[at] = static_cast<const char *>(src0) + i12 / r2 * nb02 + i13 / r3 * nb03;
                from[ne23 + at] = static_cast<const char *>(src1) + i12 * nb12 + i13 * nb13;
                to[at] = dst + i12 * nbd2 + i13 * nbd3;
            }
        }
    });
});

}  // namespace
}  // namespace software_cuda
