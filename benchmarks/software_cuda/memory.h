// The memory of the software device, and what the process has pinned of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace software_cuda {

// Prints a sentence and aborts: for what a real device would answer with a fault, or by computing garbage.
[[noreturn]] void fault(const std::string & sentence);

// Bytes of the device: SOFTWARE_CUDA_MEMORY, in MiB; 80 GiB otherwise.
std::size_t device_total();
std::size_t device_free();

// A device address, which nobody but `resolve` can follow: its pages may not be touched. nullptr when memory is out.
void * device_allocate(std::size_t bytes);
bool device_release(void * address);
bool is_device(const void * address);

// Host memory that the device may reach.
void pin(const void * address, std::size_t bytes);
bool unpin(const void * address);
bool is_pinned(const void * address);

// A live allocation as the device sees it: the addresses where it can be read and written, and how far from theirs.
struct Allocation {
    char * first;
    char * last;
    std::ptrdiff_t offset;
};

// The allocation around an address, of the device or pinned; faults when there is none.
Allocation allocation_of(const void * address);

// Where the bytes from an address on can be read and written; faults unless all are of one allocation.
char * resolve(const void * address, std::size_t bytes);

}  // namespace software_cuda
