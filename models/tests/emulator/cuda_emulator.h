// Runs CUDA kernels on the CPU, for tests on machines without a GPU. A test is a program of its own:
//
//     #define DMD_EMULATOR
//     #include "cuda_emulator.h"
//     #include "../../src/ops/gpu/kernels/norm.cu"
//     int main() {
//         dmd_emulator::Array<float> x(100);  // like a vector; NaN at first, and the first access past its end faults
//         launch(kernel, dim3(2), dim3(128), 0, x.data(), 100);
//     }
//
// built by g++ -std=c++20 -O1 -fno-strict-aliasing. `launch` returns when the kernel is through. What it offers of CUDA
// is below; what a kernel needs beyond it, add here. Dynamic shared memory is declared by DYNAMIC_SHARED(type, name),
// which common.cuh defines for CUDA. Inline PTX stays in common.cuh, in functions that this file has in plain C++.
//
// The threads of a block are fibers of one thread of the system, the blocks run one after another, so everything is
// deterministic. A warp runs until each of its threads has ended or waits at __syncthreads, then the next one runs;
// `dmd_emulator::backwards` reverses the order of warps and lanes: a kernel that gives other results then has a race.
// Reported, with exit status 1: lanes of a warp that wait at different collectives, or at one for lanes that have
// ended; threads that wait at different __syncthreads; matrices that are not aligned. Static shared memory keeps what
// the block before left there; dynamic shared memory is full of NaN at first.
#pragma once
#undef _FORTIFY_SOURCE // which takes a jump to another stack for a mistake
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <sys/mman.h>
#include <setjmp.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// Types.
#define VECTOR(T, name, bytes)                                                                  \
    struct __attribute__((may_alias, aligned(bytes / 2))) name##2 { T x, y; };                  \
    struct __attribute__((may_alias, aligned(bytes))) name##4 { T x, y, z, w; };                \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                  \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR(float, float, 16)
VECTOR(int, int, 16)
VECTOR(unsigned, uint, 16)
VECTOR(unsigned short, ushort, 8)
#undef VECTOR

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

struct __attribute__((may_alias)) __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    // To the nearest, of two that are equally near to the even one.
    __nv_bfloat16(float x) {
        const unsigned u = __float_as_uint(x);
        bits = std::isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return std::bit_cast<__nv_bfloat16>(x); }

// Arithmetic. What CUDA approximates is exact here.
template <class A, class B> auto min(A a, B b) { return std::min<std::common_type_t<A, B>>(a, b); }
template <class A, class B> auto max(A a, B b) { return std::max<std::common_type_t<A, B>>(a, b); }
// glibc declares some of these names; the definitions must be of its types, or calls would go there.
#define MATHS(name, parameters, value) inline float name parameters noexcept { return value; }
MATHS(rsqrtf, (float x), 1 / std::sqrt((double)x))
MATHS(__expf, (float x), std::exp((double)x))
MATHS(__logf, (float x), std::log((double)x))
MATHS(__sinf, (float x), std::sin((double)x))
MATHS(__cosf, (float x), std::cos((double)x))
MATHS(__fdividef, (float x, float y), x / y)
MATHS(__fdiv_rn, (float x, float y), x / y)
MATHS(__fadd_rn, (float x, float y), x + y)
MATHS(__fmul_rn, (float x, float y), x * y)
MATHS(__fmaf_rn, (float x, float y, float z), std::fma(x, y, z))
MATHS(__fsqrt_rn, (float x), std::sqrt(x))
MATHS(exp2_fast, (float x), std::exp2((double)x))
#undef MATHS
inline void sincospif(float x, float* s, float* c) { *s = std::sin(M_PI * x), *c = std::cos(M_PI * x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (uint64_t)x * y >> 32; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero((unsigned)x); }
template <class T> T __ldg(const T* p) { return *p; }

namespace dmd_emulator {
inline bool backwards = false;

// Memory of a kernel's own. Ends, rounded up to 16 bytes, where a page begins that nobody may touch.
template <class T> class Array {
    static constexpr size_t PAGE = 4096;
    size_t count, mapped;
    std::unique_ptr<char, std::function<void(char*)>> pages;
    T* first;

public:
    explicit Array(size_t count) : count(count) {
        const size_t bytes = (count * sizeof(T) + 15) / 16 * 16;
        mapped = (bytes + PAGE - 1) / PAGE * PAGE + PAGE;
        void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        pages = {(char*)start, [size = mapped](char* p) { munmap(p, size); }};
        std::memset(pages.get(), 0xff, mapped - PAGE);
        mprotect(pages.get() + mapped - PAGE, PAGE, PROT_NONE);
        first = (T*)(pages.get() + mapped - PAGE - bytes);
    }
    T* data() { return first; }
    T* begin() { return first; }
    T* end() { return first + count; }
    T& operator[](size_t i) { return first[i]; }
    size_t size() const { return count; }
};

struct Fiber {
    ucontext_t context; // where it begins
    jmp_buf here;       // and where it goes on
    bool begun, done;
    std::string_view waits; // for what; empty: runs
    unsigned mask;          // for which lanes, or the line of __syncthreads
    alignas(16) unsigned char in[64], out[64];
};
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK = 256 << 10;
constexpr std::string_view BLOCK = "__syncthreads", WARP = "__syncwarp";
inline std::vector<Fiber> fibers;
inline int current, threads;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<uint4> dynamic_shared;

// Says what is wrong, and what every thread waits for.
[[noreturn]] inline void fail(const std::string& what) {
    std::fflush(stdout);
    std::fprintf(stderr, "emulator: block (%u, %u, %u), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, current,
                 what.c_str());
    std::map<std::string, std::vector<int>> states;
    for (int i = 0; i < threads; i++) {
        const Fiber& f = fibers[i];
        char mask[32];
        std::snprintf(mask, sizeof mask, f.waits == BLOCK ? " of line %u" : " with mask %08x", f.mask);
        const std::string waiting = "waiting at " + std::string(f.waits) + mask;
        states[f.done ? "ended" : f.waits.empty() ? "running" : waiting].push_back(i);
    }
    for (const auto& [state, who] : states)
        std::fprintf(stderr, "  %zu threads, the first is %d: %s\n", who.size(), who[0], state.c_str());
    std::_Exit(1);
}

// swapcontext alone would do, but it asks the system for the signal mask every time.
inline void yield() {
    if (_setjmp(fibers[current].here) == 0) _longjmp(scheduler, 1);
}

inline void go_on(Fiber& f) {
    if (_setjmp(scheduler) != 0) return;
    if (f.begun) _longjmp(f.here, 1);
    f.begun = true;
    setcontext(&f.context);
}

inline void wait_at(std::string_view what, unsigned mask) {
    Fiber& me = fibers[current];
    me.waits = what, me.mask = mask;
    yield();
}

inline bool at(const Fiber& f, std::string_view what, unsigned mask) {
    return !f.done && f.waits == what && f.mask == mask;
}

// Hands `in` to the lanes of `mask`; the last of them to arrive calls combine(in of every lane, out of every lane).
template <class In, class Out, class F> Out collective(std::string_view kind, unsigned mask, const In& in, F combine) {
    static_assert(sizeof(In) <= sizeof(Fiber::in) && sizeof(Out) <= sizeof(Fiber::out));
    Fiber& me = fibers[current];
    Fiber* warp = &me - current % 32;
    const int lanes = std::min(32, threads - current / 32 * 32);
    if (!(mask >> current % 32 & 1)) fail("not in the mask of its own " + std::string(kind));
    if (lanes < 32 && mask >> lanes) fail(std::string(kind) + " with lanes that do not exist");
    std::memcpy(me.in, &in, sizeof in);
    me.waits = kind, me.mask = mask;
    bool last = true;
    for (int l = 0; l < lanes; l++) last &= !(mask >> l & 1) || at(warp[l], kind, mask);
    if (last) {
        In ins[32];
        Out outs[32];
        for (int l = 0; l < lanes; l++) std::memcpy(&ins[l], warp[l].in, sizeof(In));
        combine(ins, outs);
        for (int l = 0; l < lanes; l++)
            if (mask >> l & 1) std::memcpy(warp[l].out, &outs[l], sizeof(Out)), warp[l].waits = {};
    } else {
        yield();
    }
    Out out;
    std::memcpy(&out, me.out, sizeof out);
    return out;
}

template <class T> T shuffle(std::string_view kind, unsigned mask, T value, int from) {
    struct In { T value; int from; };
    return collective<In, T>(kind, mask, {value, from}, [&](In* in, T* out) {
        for (int l = 0; l < 32; l++) {
            if (!(mask >> l & 1)) continue;
            if (!(mask >> in[l].from & 1)) fail(std::string(kind) + " from a lane outside the mask");
            out[l] = in[in[l].from].value;
        }
    });
}

inline void start() {
    body();
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

// Goes on with a warp as long as it can.
inline void run_warp(int warp) {
    const int first = warp * 32, lanes = std::min(32, threads - first);
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < lanes; i++) {
            current = first + (backwards ? lanes - 1 - i : i);
            Fiber& f = fibers[current];
            if (f.done || !f.waits.empty()) continue;
            moved = true;
            const unsigned t = current;
            threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
            go_on(f);
        }
        // Lanes that have ended need not come to __syncwarp.
        for (int i = 0; i < lanes && !moved; i++) {
            const Fiber& f = fibers[first + i];
            if (f.done || f.waits != WARP) continue;
            bool all = true;
            for (int l = 0; l < lanes; l++)
                all &= !(f.mask >> l & 1) || fibers[first + l].done || at(fibers[first + l], WARP, f.mask);
            if (!all) continue;
            moved = true;
            for (int l = 0; l < lanes; l++)
                if (f.mask >> l & 1) fibers[first + l].waits = {};
        }
    }
}

inline void run_block() {
    for (int i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.begun = f.done = false, f.waits = {};
        f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
    }
    for (;;) {
        const int warps = (threads + 31) / 32;
        for (int i = 0; i < warps; i++) run_warp(backwards ? warps - 1 - i : i);
        int waiting = -1;
        for (int i = 0; i < threads; i++) {
            if (fibers[i].done) continue;
            current = i;
            if (fibers[i].waits != BLOCK) fail("waits for threads that will never come");
            if (waiting >= 0 && fibers[waiting].mask != fibers[i].mask) fail("waits at another __syncthreads");
            waiting = i;
        }
        if (waiting < 0) return;
        for (int i = 0; i < threads; i++) fibers[i].waits = {};
    }
}

} // namespace dmd_emulator

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
    using namespace dmd_emulator;
    threads = block.x * block.y * block.z;
    blockDim = block, gridDim = grid;
    if (threads < 1 || threads > MAX_THREADS) fail("a block of " + std::to_string(threads) + " threads");
    fibers.resize(MAX_THREADS); // Never moves them again: contexts point into themselves.
    for (Fiber& f : fibers) {
        if (f.context.uc_stack.ss_sp != nullptr) break;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        f.context.uc_stack.ss_size = STACK;
    }
    body = [&] { kernel(P(args)...); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                dynamic_shared.assign((shared_bytes + 15) / 16, {~0u, ~0u, ~0u, ~0u});
                run_block();
            }
}

#define __syncthreads() dmd_emulator::wait_at(dmd_emulator::BLOCK, __LINE__)
inline void __syncwarp(unsigned mask = ~0u) { dmd_emulator::wait_at(dmd_emulator::WARP, mask); }
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(dmd_emulator::dynamic_shared.data())

// A lane whose source is outside its run of `width` lanes gets its own value.
#define SHUFFLE(name, source)                                                                      \
    template <class T> T name(unsigned mask, T value, int by, int width = 32) {                     \
        const int lane = dmd_emulator::current % 32, run = lane / width * width, from = source;     \
        const bool inside = from >= run && from < run + width;                                      \
        return dmd_emulator::shuffle(#name, mask, value, inside ? from : lane);                     \
    }
SHUFFLE(__shfl_sync, run + by % width)
SHUFFLE(__shfl_xor_sync, lane ^ by)
SHUFFLE(__shfl_down_sync, lane + by)
SHUFFLE(__shfl_up_sync, lane - by)
#undef SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return dmd_emulator::collective<int, unsigned>("__ballot_sync", mask, predicate, [&](int* in, unsigned* out) {
        unsigned all = 0;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1 && in[l]) all |= 1u << l;
        std::fill(out, out + 32, all);
    });
}
inline bool __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T> T atomicAdd(T* p, std::type_identity_t<T> v) { const T old = *p; return *p = old + v, old; }
template <class T> T atomicMax(T* p, std::type_identity_t<T> v) { const T old = *p; return *p = max(old, v), old; }
template <class T> T atomicMin(T* p, std::type_identity_t<T> v) { const T old = *p; return *p = min(old, v), old; }
template <class T> T atomicExch(T* p, std::type_identity_t<T> v) { const T old = *p; return *p = v, old; }

// What common.cuh has in PTX; fragments lie in the lanes as the PTX manual's section on mma.m16n8k16 shows.
inline uint32_t bf16_pair(float low, float high) {
    return __nv_bfloat16(low).bits | (uint32_t)__nv_bfloat16(high).bits << 16;
}

inline void load_matrices(uint32_t (&r)[4], const __nv_bfloat16* row, bool transposed) {
    struct Out { uint32_t r[4]; };
    using Row = const __nv_bfloat16*;
    if ((uintptr_t)row % 16) dmd_emulator::fail("ldmatrix of an address that is not aligned to 16 bytes");
    const Out out = dmd_emulator::collective<Row, Out>(
        transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4", ~0u, row, [&](Row* rows, Out* out) {
            auto value = [&](int m, int i, int j) -> uint32_t {
                return transposed ? rows[8 * m + j][i].bits : rows[8 * m + i][j].bits;
            };
            for (int l = 0; l < 32; l++)
                for (int m = 0; m < 4; m++)
                    out[l].r[m] = value(m, l / 4, l % 4 * 2) | value(m, l / 4, l % 4 * 2 + 1) << 16;
        });
    std::copy(out.r, out.r + 4, r);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const __nv_bfloat16* row) { load_matrices(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const __nv_bfloat16* row) { load_matrices(r, row, true); }

inline uint32_t tf32(float x) {
    // To nearest, ties away from zero: half of the last bit that stays, then the rest cut off.
    return std::isnan(x) ? __float_as_uint(x) : (__float_as_uint(x) + 0x1000u) & ~0x1fffu;
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct In { uint32_t a[4], b[2]; float c[4]; };
    struct Out { float c[4]; };
    const In own = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    const Out out = dmd_emulator::collective<In, Out>("mma_tf32", ~0u, own, [](In* in, Out* out) {
        // The hardware does not see the last 13 bits.
        auto seen = [](uint32_t x) { return __uint_as_float(x & ~0x1fffu); };
        float A[16][8], B[8][8];
        for (int l = 0; l < 32; l++) {
            for (int i = 0; i < 4; i++) A[l / 4 + i % 2 * 8][l % 4 + i / 2 * 4] = seen(in[l].a[i]);
            for (int i = 0; i < 2; i++) B[l % 4 + i * 4][l / 4] = seen(in[l].b[i]);
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                double sum = in[l].c[i];
                for (int k = 0; k < 8; k++) sum += (double)A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
                out[l].c[i] = sum;
            }
    });
    std::copy(out.c, out.c + 4, c);
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct In { uint32_t a[4], b[2]; float c[4]; };
    struct Out { float c[4]; };
    const In own = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    const Out out = dmd_emulator::collective<In, Out>("mma_bf16", ~0u, own, [](In* in, Out* out) {
        auto half = [](uint32_t pair, int i) { return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16); };
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 8; i++) {
                // Registers 0 and 1 are the upper and the lower eight rows of columns 0 to 7, 2 and 3 those of 8 to 15.
                A[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = half(in[l].a[i / 2], i);
                if (i < 4) B[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = half(in[l].b[i / 2], i);
            }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                double sum = in[l].c[i];
                for (int k = 0; k < 16; k++) sum += (double)A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
                out[l].c[i] = sum;
            }
    });
    std::copy(out.c, out.c + 4, c);
}
