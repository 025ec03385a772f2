#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashrt {

namespace scalar { extern const Kernels table_of_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels table_of_kernels; }
namespace avx512 { extern const Kernels table_of_kernels; }
namespace avx512bf16 { extern const Kernels table_of_kernels; }
namespace amx { extern const Kernels table_of_kernels; }
#endif

namespace {

struct Level {
    const Kernels* kernels;
    bool available;
};

#if defined(__x86_64__)
// Whether there are AMX's tiles of bfloat16. Linux gives a process their registers where it asks for them.
bool have_tiles() {
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & BF16) == 0 || (d & TILE) == 0) return false;
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

// Worst first.
const Level* levels(int& count) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("avx512vnni");
    static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool has_amx = has_bf16 && have_tiles();
    static const Level all[] = {{&scalar::table_of_kernels, true},
                                {&avx2::table_of_kernels, has_avx2},
                                {&avx512::table_of_kernels, has_avx512},
                                {&avx512bf16::table_of_kernels, has_bf16},
                                {&amx::table_of_kernels, has_amx}};
#else
    static const Level all[] = {{&scalar::table_of_kernels, true}};
#endif
    count = sizeof all / sizeof all[0];
    return all;
}

const Kernels* best() {
    int count;
    const Level* all = levels(count);
    while (!all[count - 1].available) --count;
    return all[count - 1].kernels;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* now = chosen.load(std::memory_order_relaxed);
    if (!now) {
        now = best();
        chosen.store(now, std::memory_order_relaxed);
    }
    return *now;
}

const char* isa() { return kernels().name; }

bool force_isa(const char* name) {
    if (!name) {
        chosen.store(best());
        return true;
    }
    int count;
    const Level* all = levels(count);
    for (int i = 0; i < count; ++i) {
        if (all[i].available && std::strcmp(all[i].kernels->name, name) == 0) {
            chosen.store(all[i].kernels);
            return true;
        }
    }
    return false;
}

int available_isas(const char** names, int room) {
    int count, found = 0;
    const Level* all = levels(count);
    for (int i = 0; i < count && found < room; ++i)
        if (all[i].available) names[found++] = all[i].kernels->name;
    return found;
}

}  // namespace flashrt
