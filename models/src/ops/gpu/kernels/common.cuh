// What the kernels share. Everything computes in f32; values lie in memory as f32 or bf16.
#pragma once
#ifndef DMD_EMULATOR // tests/emulator/cuda_emulator.h stands in for CUDA.
#include <cuda_bf16.h>
#endif
#include <stdint.h>

typedef __nv_bfloat16 bf16;

template <typename T> __device__ __forceinline__ float load(const T* p);
template <> __device__ __forceinline__ float load<float>(const float* p) { return *p; }
template <> __device__ __forceinline__ float load<bf16>(const bf16* p) { return __bfloat162float(*p); }

template <typename T> __device__ __forceinline__ void store(T* p, float v);
template <> __device__ __forceinline__ void store<float>(float* p, float v) { *p = v; }
template <> __device__ __forceinline__ void store<bf16>(bf16* p, float v) { *p = __float2bfloat16(v); }

// Two values rounded to bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high);

// Runs of VEC neighbouring channels, 16 bytes each: eight of bf16, four of f32.
template <typename T> struct Vec;
template <> struct Vec<float> {
    static constexpr int N = 4;
    static __device__ __forceinline__ void load(const float* p, float* v) {
        const float4 a = *reinterpret_cast<const float4*>(p);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    }
    static __device__ __forceinline__ void store(float* p, const float* v) {
        *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
    }
};
template <> struct Vec<bf16> {
    static constexpr int N = 8;
    static __device__ __forceinline__ void load(const bf16* p, float* v) {
        const uint4 a = *reinterpret_cast<const uint4*>(p);
        const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // bf16 is the upper half of f32.
            v[2 * i] = __uint_as_float(words[i] << 16);
            v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ void store(bf16* p, const float* v) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
        *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
    }
};

// Adds VEC neighbours of `row`, where there is a row.
template <int N> __device__ __forceinline__ void add_row(const float* row, float* v) {
    if (row == nullptr) return;
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += row[i];
}

// Defines `name##_f32` and `name##_bf16` as kernels that call the template `name` with all their arguments; `bounds` may
// say how many threads a block has and how many blocks should share a multiprocessor.
#define FOR_BOTH_WITHIN(bounds, name, parameters, arguments)                                    \
    extern "C" __global__ void bounds name##_f32 parameters(float) { name<float> arguments; }   \
    extern "C" __global__ void bounds name##_bf16 parameters(bf16) { name<bf16> arguments; }
#define FOR_BOTH(name, parameters, arguments) FOR_BOTH_WITHIN(, name, parameters, arguments)

// Instructions that C++ has no words for; the emulator has its own versions of them.
#ifndef DMD_EMULATOR
// Four 8×8 matrices of bf16 from shared memory: lane i gives the address of row i % 8 of matrix i / 8, and receives of
// every matrix m the values (lane / 4, 2·(lane % 4)) and the next in r[m].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
// The same of the transposed matrices.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
// c (16×8, f32) += a (16×16)·b (16×8), spread over the warp as PTX says.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same of TF32, a (16×8)·b (8×8).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// A value rounded to TF32, ten bits of fraction.
__device__ __forceinline__ uint32_t tf32(float x) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
// 2^x to about 22 bits; 0 of −∞.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// `name` as a pointer to the shared memory that the launch asked for, aligned to 16 bytes.
#define DYNAMIC_SHARED(T, name)             \
    extern __shared__ uint4 dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared)
#endif
