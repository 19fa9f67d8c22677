// One file in memory, mapped twice: where programs see device addresses nothing may be touched, so that host code that
// follows one crashes, and elsewhere it can be read and written. Pages cost nothing before they are written.
#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace software_cuda {
namespace {

constexpr std::size_t kAlignment = 512;
// Between allocations, so that one that is overrun does not reach the next.
constexpr std::size_t kGap = 4096;
// New memory is full of NaN, as far as that is cheap: whoever trusts it to be zero is found out.
constexpr std::size_t kPoisoned = std::size_t{64} << 20;

struct Arena {
    std::size_t total;
    std::size_t span;
    std::size_t used = 0;
    int file;
    char * addresses;
    char * view;
    std::map<std::size_t, std::size_t> live;  // offset: bytes

    Arena() {
        const char * wanted = std::getenv("SOFTWARE_CUDA_MEMORY");
        total = (wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 80 * 1024) << 20;
        span = total + total / 8 + (std::size_t{1} << 30);
        file = memfd_create("software-cuda", MFD_CLOEXEC);
        if (file < 0 || ftruncate(file, static_cast<off_t>(span)) != 0) {
            fault("no file in memory can be made for the device");
        }
        addresses = map(PROT_NONE);
        view = map(PROT_READ | PROT_WRITE);
    }

    char * map(int protection) const {
        void * found = mmap(nullptr, span, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
        if (found == MAP_FAILED) {
            fault("the device's memory cannot be mapped");
        }
        return static_cast<char *>(found);
    }

    bool holds(const void * address) const { return address >= addresses && address < addresses + span; }

    std::size_t offset_of(const void * address) const {
        return static_cast<std::size_t>(static_cast<const char *>(address) - addresses);
    }
};

Arena & arena() {
    static Arena & one = *new Arena;  // never destroyed: libraries free their buffers at exit
    return one;
}

std::map<std::uintptr_t, std::size_t> & pinned() {
    static auto & ranges = *new std::map<std::uintptr_t, std::size_t>;
    return ranges;
}

// The range of a map that holds a key, or its end.
template <class Map> typename Map::const_iterator range_around(const Map & ranges, typename Map::key_type key) {
    auto next = ranges.upper_bound(key);
    if (next == ranges.begin()) {
        return ranges.end();
    }
    --next;
    return key < next->first + std::max<std::size_t>(next->second, 1) ? next : ranges.end();
}

std::size_t rounded(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void fault(const std::string & sentence) {
    std::fprintf(stderr, "software CUDA: %s\n", sentence.c_str());
    std::fflush(stderr);
    std::abort();
}

std::size_t device_total() { return arena().total; }

std::size_t device_free() { return arena().total - arena().used; }

void * device_allocate(std::size_t bytes) {
    Arena & memory = arena();
    const std::size_t size = rounded(std::max<std::size_t>(bytes, 1));
    if (size > device_free()) {
        return nullptr;
    }
    std::size_t offset = 0;
    for (const auto & [first, length] : memory.live) {
        if (offset + size + kGap <= first) {
            break;
        }
        offset = first + rounded(length) + kGap;
    }
    if (offset + size > memory.span) {
        return nullptr;
    }
    memory.live[offset] = bytes;
    memory.used += size;
    if (bytes <= kPoisoned) {
        std::memset(memory.view + offset, 0xff, bytes);
    }
    return memory.addresses + offset;
}

bool device_release(void * address) {
    Arena & memory = arena();
    const auto found = memory.holds(address) ? memory.live.find(memory.offset_of(address)) : memory.live.end();
    if (found == memory.live.end()) {
        return false;
    }
    const std::size_t size = rounded(std::max<std::size_t>(found->second, 1));
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t first = (found->first + page - 1) / page * page;
    const std::size_t last = (found->first + size) / page * page;
    if (first < last) {
        fallocate(memory.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(first),
                  static_cast<off_t>(last - first));
    }
    memory.used -= size;
    memory.live.erase(found);
    return true;
}

bool is_device(const void * address) { return arena().holds(address); }

void pin(const void * address, std::size_t bytes) { pinned()[reinterpret_cast<std::uintptr_t>(address)] = bytes; }

bool unpin(const void * address) { return pinned().erase(reinterpret_cast<std::uintptr_t>(address)) > 0; }

bool is_pinned(const void * address) {
    return range_around(pinned(), reinterpret_cast<std::uintptr_t>(address)) != pinned().end();
}

Allocation allocation_of(const void * address) {
    const Arena & memory = arena();
    if (memory.holds(address)) {
        const auto found = range_around(memory.live, memory.offset_of(address));
        if (found == memory.live.end()) {
            fault("the device follows an address where nothing is allocated any more");
        }
        char * first = memory.view + found->first;
        return {first, first + found->second, memory.view - memory.addresses};
    }
    const auto found = range_around(pinned(), reinterpret_cast<std::uintptr_t>(address));
    if (found == pinned().end()) {
        fault("the device follows an address of the host that is not pinned");
    }
    char * first = reinterpret_cast<char *>(found->first);
    return {first, first + found->second, 0};
}

char * resolve(const void * address, std::size_t bytes) {
    const Allocation around = allocation_of(address);
    char * first = const_cast<char *>(static_cast<const char *>(address)) + around.offset;
    if (bytes > static_cast<std::size_t>(around.last - first)) {
        fault("the device reaches " + std::to_string(bytes) + " bytes from an address with " +
              std::to_string(around.last - first) + " bytes to the end of its allocation");
    }
    return first;
}

}  // namespace software_cuda
