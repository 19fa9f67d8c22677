// Kernels in software: found by the name that nvcc gave them, called with exactly the parameters they have there.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <typeinfo>
#include <utility>
#include <vector>

#include "memory.h"
#include "stream.h"

namespace software_cuda {

struct Launch {
    dim3 grid;
    dim3 block;
    std::size_t shared;
};

// A kernel: the parameters that it must have been compiled with, and how to take a launch's arguments.
struct Kernel {
    std::string parameters;
    std::function<Task(const Launch &, void ** arguments)> bind;
};

// Template arguments of a kernel as a demangler prints them.
using Templates = std::vector<std::string>;

// Declares the kernel of a name; `make` gives a Kernel without `bind` for template arguments that it does not know.
struct Family {
    Family(const std::string & name, std::function<Kernel(const Templates &)> make);
};

// Splits "a, b<c, d>".
Templates split(const std::string & list);

// Splits "void name<a, b>(parameters)".
struct Name {
    std::string base;
    Templates templates;
    std::string parameters;
};
Name parse_name(const std::string & demangled);

std::string demangled(const char * name);

// The software version of a kernel; without `bind` when there is none. Faults when its parameters are others.
Kernel find_kernel(const std::string & demangled);

template <class F, class... A> Kernel kernel_of(F function, void (F::*)(const Launch &, A...) const) {
    return {parse_name(demangled(typeid(void (*)(A...)).name())).parameters,
            [function](const Launch & launch, void ** arguments) -> Task {
                std::tuple<A...> copied;
                std::size_t index = 0;
                std::apply([&](auto &... each) { (std::memcpy(&each, arguments[index++], sizeof each), ...); }, copied);
                return [function, launch, copied] {
                    std::apply([&](const auto &... each) { function(launch, each...); }, copied);
                };
            }};
}

// A kernel from a lambda `(const Launch &, parameters...)`.
template <class F> Kernel kernel(F function) { return kernel_of(function, &F::operator()); }

// Elements on the device from a pointer of a kernel on; faults outside of the allocation.
template <class T> class Array {
  public:
    explicit Array(T * pointer) : around_(allocation_of(pointer)), base_(resolved(pointer)) {}

    template <class I> T & operator[](I index) const { return *run(index, 1); }

    // So many elements that follow each other.
    template <class I> T * run(I index, std::size_t count) const {
        T * first = base_ + static_cast<std::ptrdiff_t>(index);
        if (reinterpret_cast<const char *>(first) < around_.first ||
            reinterpret_cast<const char *>(first + count) > around_.last) {
            fault("a kernel leaves the allocation that its pointer is of");
        }
        return first;
    }

  private:
    T * resolved(T * pointer) const {
        return reinterpret_cast<T *>(reinterpret_cast<std::uintptr_t>(pointer) + around_.offset);
    }

    Allocation around_;
    T * base_;
};

inline float to_float(float value) { return value; }
inline float to_float(__half value) {
    _Float16 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<float>(bits);
}

template <class T> T from_float(float value);
template <> inline float from_float<float>(float value) { return value; }
template <> inline __half from_float<__half>(float value) {
    const _Float16 bits = static_cast<_Float16>(value);
    __half_raw raw;
    std::memcpy(&raw.x, &bits, sizeof raw.x);
    return raw;
}

// A kernel for the element type of a name; `make` is called with a value of the type.
template <class F> Kernel for_type(const std::string & name, F make) {
    return name == "float" ? make(float{}) : name == "__half" ? make(__half{}) : Kernel{};
}

// The number of a template argument like "(ggml_type)8".
int enumerator(const std::string & text);

// The part of a template argument between two marks: "cpy_1_scalar<" and ">".
std::string between(const std::string & text, const std::string & first, const std::string & last);

// ggml's packed divisors carry the divisor itself last.
inline unsigned divisor(uint3 packed) { return packed.z; }

inline unsigned blocks(unsigned count, unsigned size) { return (count + size - 1) / size; }

}  // namespace software_cuda
