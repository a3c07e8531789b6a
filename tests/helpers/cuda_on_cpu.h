/* Gives the words of CUDA that bstack's kernels use a meaning in C++, so that they run on a CPU.
 *
 * Thread blocks run one after the other, in one thread of the system; their threads are contexts that take turns. A warp runs
 * as far as it can before another does, so that a missing barrier has its worst effect. Shared memory is filled with NaN before each block. Reads through __ldg and __ldcs
 * must be aligned and must not touch a fence, which tests put around arrays.
 */
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

struct dim3_ {
    unsigned x, y, z;
};
static dim3_ threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) float4 {
    float x, y, z, w;
};
using std::size_t;

#define __device__
#define __global__
#define __forceinline__ inline
#define __align__ alignas
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_on_cpu")))
extern "C" unsigned char __start_shared_on_cpu[], __stop_shared_on_cpu[];

namespace cpu {
enum State { RUNS, AT_BLOCK, AT_WARP, ENDED };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    State state;
    unsigned shuffles;
    uint32_t given[2]; /* in turn: a lane may be one exchange ahead of others */
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static unsigned current;
static bool backwards;
static void (*body)(void **);
static void **arguments;
static std::vector<std::pair<size_t, size_t>> fences;
static std::string fault;

static void wait(State state) {
    Thread &thread = threads[current];
    thread.state = state;
    swapcontext(&thread.context, &scheduler);
}

static void run_thread() {
    body(arguments);
    threads[current].state = ENDED;
}

/* Run the threads of a warp until all of them wait for the block or have ended, or never will. */
static void run_warp(unsigned first) {
    for (;;) {
        for (unsigned i = 0; i < 32; i++) {
            current = threadIdx.x = first + (backwards ? 31 - i : i);
            if (threads[current].state == RUNS) swapcontext(&scheduler, &threads[current].context);
        }
        for (unsigned i = first; i < first + 32; i++)
            if (threads[i].state != AT_WARP) return;
        for (unsigned i = first; i < first + 32; i++) threads[i].state = RUNS;
    }
}

/* Let the threads go on if all of them wait for the block. */
static bool release() {
    for (const Thread &thread : threads)
        if (thread.state != AT_BLOCK) return false;
    for (Thread &thread : threads) thread.state = RUNS;
    return true;
}

static void run_block() {
    memset(__start_shared_on_cpu, 0xff, __stop_shared_on_cpu - __start_shared_on_cpu);
    for (Thread &thread : threads) {
        getcontext(&thread.context);
        thread.stack.resize(1 << 16);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        thread.state = RUNS, thread.shuffles = 0;
        makecontext(&thread.context, run_thread, 0);
    }
    const unsigned size = threads.size();
    do
        for (unsigned first = 0; first < size; first += 32) run_warp(backwards ? size - 32 - first : first);
    while (release());
    for (const Thread &thread : threads)
        if (thread.state != ENDED) fault = "threads of a block wait for others that never come";
}

static uint32_t exchange(uint32_t bits, int other) {
    Thread &own = threads[current];
    const unsigned turn = own.shuffles++ & 1;
    own.given[turn] = bits;
    wait(AT_WARP);
    return threads[current - current % 32 + (unsigned)other % 32].given[turn];
}

template <typename T> T read(const T *at) {
    const size_t start = (size_t)at;
    T value = {};
    for (const auto &fence : fences)
        if (start < fence.second && start + sizeof(T) > fence.first) {
            fault = "a read of " + std::to_string(sizeof(T)) + " bytes outside of an array";
            return value;
        }
    if (start % alignof(T))
        fault = "a read of " + std::to_string(sizeof(T)) + " bytes at an address that is not aligned";
    else
        memcpy(&value, at, sizeof value);
    return value;
}

template <typename... A, size_t... I> void call(void (*kernel)(A...), void **given, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)given[I]...);
}
template <auto KERNEL> void unpack(void **given) {
    [&]<typename... A>(void (*kernel)(A...)) { call(kernel, given, std::index_sequence_for<A...>{}); }(KERNEL);
}
template <auto KERNEL> std::vector<size_t> sizes_of() {
    return []<typename... A>(void (*)(A...)) { return std::vector<size_t>{sizeof(A)...}; }(KERNEL);
}
struct Kernel {
    const char *name;
    void (*body)(void **);
    std::vector<size_t> sizes; /* of its arguments */
};
} // namespace cpu

static inline void __syncthreads() { cpu::wait(cpu::AT_BLOCK); }
static inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float __shfl_xor_sync(unsigned mask, float value, int step) {
    if (mask != ~0u) cpu::fault = "an exchange of a part of a warp";
    return __uint_as_float(cpu::exchange(__float_as_uint(value), (int)(threadIdx.x % 32) ^ step));
}
static inline float __shfl_sync(unsigned mask, float value, int lane) {
    if (mask != ~0u) cpu::fault = "an exchange of a part of a warp";
    return __uint_as_float(cpu::exchange(__float_as_uint(value), lane));
}
static inline void __syncwarp() { cpu::wait(cpu::AT_WARP); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint32_t result = 0;
    for (int k = 0; k < 4; k++) {
        const uint32_t from = selector >> 4 * k & 7;
        result |= ((from < 4 ? x >> 8 * from : y >> 8 * (from - 4)) & 255) << 8 * k;
    }
    return result;
}
template <typename T> T __ldg(const T *at) { return cpu::read(at); }
template <typename T> T __ldcs(const T *at) { return cpu::read(at); }
static inline int min(int a, int b) { return b < a ? b : a; }
static inline int max(int a, int b) { return a < b ? b : a; }
static inline float rsqrtf(float value) { return 1 / sqrtf(value); }
static inline float half_to_float(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
static inline unsigned short float_to_half(float value) {
    const _Float16 half = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

extern "C" {
void fence(const void *at, size_t length) { cpu::fences.push_back({(size_t)at, (size_t)at + length}); }
void remove_fences() { cpu::fences.clear(); }
const char *last_fault() { return cpu::fault.c_str(); }
}
/* `KERNELS(K)` lists the kernels, K(name) each. `launch` returns 1 for an unknown name or arguments of other sizes. */
#define EXPORT_KERNELS(KERNELS)                                                                                            \
    static const cpu::Kernel kernels[] = {KERNELS(CPU_KERNEL)};                                                            \
    extern "C" int launch(const char *name, unsigned x, unsigned y, unsigned size, void **given, const size_t *sizes,      \
                          size_t count, int backwards) {                                                                   \
        for (const cpu::Kernel &kernel : kernels)                                                                          \
            if (!strcmp(kernel.name, name)) {                                                                              \
                if (kernel.sizes != std::vector<size_t>(sizes, sizes + count)) return 1;                                   \
                cpu::fault.clear(), cpu::body = kernel.body, cpu::arguments = given, cpu::backwards = backwards;           \
                cpu::threads.resize(size), blockDim = {size, 1, 1}, gridDim = {x, y, 1};                                   \
                for (unsigned b = 0; b < x * y; b++) blockIdx = {b % x, b / x, 0}, cpu::run_block();                       \
                return 0;                                                                                                  \
            }                                                                                                              \
        return 1;                                                                                                          \
    }
#define CPU_KERNEL(NAME) {#NAME, cpu::unpack<NAME>, cpu::sizes_of<NAME>()},
