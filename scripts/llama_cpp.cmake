# Included by CMake after llama.cpp's project(): llama-cpp-python loads the library alone, and half of the compile time
# is `common`, which serves llama.cpp's own programs. A plain variable hides the cached one that the package forces.
set(LLAMA_BUILD_COMMON OFF)
