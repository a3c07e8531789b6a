/* Choose the instruction set. */
#include "kernels.h"

#ifdef BSTACK_X86
#include <cpuid.h>
#endif
#ifdef BSTACK_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Ask the processor, and Linux for the state of tiles, which it saves only for programs that asked. */
static int has_amx(void) {
    enum { TILE = 1 << 24, INT8 = 1 << 25, REQUEST = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & INT8) && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
#endif

static const struct kernels *chosen;

static int has(const struct kernels *kernels) {
#ifdef BSTACK_X86
    __builtin_cpu_init(); /* also asks the operating system whether it saves the registers */
    const int avx2 = __builtin_cpu_supports("avx2");
    const int avx512bw = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl");
    if (kernels == &bstack_avx2) return avx2;
    if (kernels == &bstack_avx512bw) return avx512bw;
    const int avx512 = avx512bw && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    if (kernels == &bstack_avx512) return avx512;
#ifdef BSTACK_AMX
    if (kernels == &bstack_amx) return avx512 && has_amx();
#endif
#ifdef BSTACK_AVXVNNI
    if (kernels == &bstack_avxvnni) {
        unsigned a, b, c, d; /* compilers learned its name later than the instructions */
        return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    }
#endif
#endif
#ifdef BSTACK_NEON
    if (kernels == &bstack_neon) return 1; /* part of the architecture */
#endif
    return kernels == &bstack_portable;
}

/* Best first. */
static const struct kernels *const all[] = {
#ifdef BSTACK_X86
#ifdef BSTACK_AMX
    &bstack_amx,
#endif
    &bstack_avx512,
#ifdef BSTACK_AVXVNNI
    &bstack_avxvnni,
#endif
    &bstack_avx512bw,
    &bstack_avx2,
#endif
#ifdef BSTACK_NEON
    &bstack_neon,
#endif
    &bstack_portable,
};
enum { COUNT = sizeof all / sizeof *all };

const struct kernels *bstack_kernels(void) {
    if (!chosen)
        for (int i = COUNT - 1; i >= 0; i--)
            if (has(all[i])) chosen = all[i];
    return chosen;
}

const char *bstack_instructions(void) { return bstack_kernels()->name; }

static int find(const char *name, const struct kernels **found) {
    for (int i = 0; i < COUNT; i++)
        if (!strcmp(name, all[i]->name)) {
            *found = all[i];
            return has(all[i]) ? 0 : 2;
        }
    return 1;
}

int bstack_offers(const char *name) {
    const struct kernels *found;
    return find(name, &found);
}

int bstack_use(const char *name) {
    const struct kernels *found;
    const int problem = find(name, &found);
    if (!problem) chosen = found;
    return problem;
}

/* Grows with every change of a signature that Python calls, so that a library left from an earlier build is not used. */
int bstack_kernels_version(void) { return 7; }
