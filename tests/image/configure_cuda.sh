#!/bin/bash
# Configures llama.cpp with the arguments of Dockerfile.cuda against the CUDA toolkit of this machine, and compiles one kernel for
# every GPU that they name: shows that CMake takes the arguments and nvcc knows the architectures, without a GPU and without the
# hour that all kernels take. Needs nvcc, a C++ compiler, and a Python with pip.
#
#   CUDA_HOME=DIR    the toolkit, /usr/local/cuda if not given
#   WORK=DIR         where to work; kept, with the downloads
#   PYTHON=python3   the Python that downloads llama-cpp-python's source, CMake and Ninja
set -euo pipefail

repository="$(cd "$(dirname "$0")/../.." && pwd)"
PYTHON="${PYTHON:-python3}"
CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
if [ -z "${WORK:-}" ]; then
    WORK="$(mktemp -d)"
    trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
[ -x "$CUDA_HOME/bin/nvcc" ] || fail "there is no nvcc in $CUDA_HOME/bin; set CUDA_HOME"

# The arguments as Dockerfile.cuda has them.
argument() { sed -n "s/^ARG $1=\"\(.*\)\"\$/\1/p" "$repository/Dockerfile.cuda"; }
architectures="$(sed -n "s/^ *\*) *default=\"\(.*\)\" ;;.*/\1/p" "$repository/Dockerfile.cuda")"
common="$(argument CMAKE_ARGS_COMMON)" cpu="$(argument CMAKE_ARGS_CPU)" cuda="$(argument CMAKE_ARGS_CUDA)"
common="${common/\/src\//$repository/scripts/}" # the file that the image's build copies to /src
for value in "$common" "$cpu" "$cuda" "$architectures"; do [ -n "$value" ] || fail "Dockerfile.cuda has other arguments than this expects"; done

"$PYTHON" -m venv "$WORK/tools"
"$WORK/tools/bin/pip" install --quiet cmake ninja
version="$(sed -n 's/^llama-cpp-python==//p' "$repository/requirements.lock")"
if [ ! -d "$WORK/source" ]; then
    "$WORK/tools/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$WORK" "llama-cpp-python==$version"
    mkdir "$WORK/source"
    tar -xf "$WORK"/llama_cpp_python-*.tar.gz -C "$WORK/source" --strip-components=1
fi

# A toolkit without cuBLAS or the driver's stub, such as one made of wheels: headers from NVIDIA's package, and libraries that are
# named right, which is all that CMake asks for. Nothing is linked here.
extra=()
if ! ls "$CUDA_HOME"/lib64/libcublas.so > /dev/null 2>&1; then
    release="$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')"
    "$WORK/tools/bin/pip" install --quiet --no-deps --target "$WORK/cublas" "nvidia-cublas$([ "$release" -ge 13 ] || echo "-cu$release")==$release.*"
    include="$(dirname "$(find "$WORK/cublas" -name cublas_v2.h -print -quit)")"
    mkdir -p "$WORK/lib"
    for library in cublas cublasLt cuda; do echo | cc -shared -x c - -o "$WORK/lib/lib$library.so"; done
    extra=(-DCUDA_cublas_LIBRARY="$WORK/lib/libcublas.so" -DCUDA_cublasLt_LIBRARY="$WORK/lib/libcublasLt.so"
           -DCUDA_cuda_driver_LIBRARY="$WORK/lib/libcuda.so" -DCMAKE_CUDA_FLAGS="-I$include" -DCMAKE_CXX_FLAGS="-I$include")
fi

export PATH="$WORK/tools/bin:$CUDA_HOME/bin:$PATH"
# shellcheck disable=SC2086 - each holds several arguments
cmake -S "$WORK/source" -B "$WORK/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PLATLIB_DIR="$WORK/wheel" -DGGML_CCACHE=OFF \
    -DCMAKE_CUDA_COMPILER="$CUDA_HOME/bin/nvcc" $common $cpu $cuda "-DCMAKE_CUDA_ARCHITECTURES=$architectures" "${extra[@]}" \
    > "$WORK/configure.log" 2>&1 || { tail -n 40 "$WORK/configure.log" >&2; fail "CMake refuses; its log is above"; }
grep -E "CUDA Toolkit found|Using CMAKE_CUDA_ARCHITECTURES|Including CUDA backend|Adding CPU backend variant" "$WORK/configure.log"

kernel="$(ninja -C "$WORK/build" -t targets all | sed -n 's/^\([^:]*ggml-cuda.dir[^:]*\/scale\.cu\.o\):.*/\1/p')"
[ -n "$kernel" ] || fail "there is no kernel to compile"
ninja -C "$WORK/build" "$kernel" > "$WORK/compile.log" 2>&1 || { tail -n 40 "$WORK/compile.log" >&2; fail "nvcc refuses; its log is above"; }
printf 'compiled %s for %s: %s bytes\n' "$(basename "$kernel")" "$architectures" "$(stat -c %s "$WORK/build/$kernel")"
