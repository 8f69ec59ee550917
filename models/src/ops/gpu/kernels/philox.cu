// Unit normals from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the very
// numbers of dmd_runtime::noise::Stream::normal: key = seed, counter = (block, purpose, low and high half of index), and
// two normals a block by Box and Muller's method in f64, rounded to f32. CUDA's logarithm and sine are good to an ulp or
// two of f64, so the rounded numbers differ from the runtime's, in the last bit, about once in 10^8.
#include "common.cuh"

struct Words { uint32_t w[4]; };

// Ten rounds; constants from the paper's Table 2.
__device__ __forceinline__ Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = (uint64_t)0xD2511F53u * counter.w[0];
        const uint64_t product1 = (uint64_t)0xCD9E8D57u * counter.w[2];
        counter = {{(uint32_t)(product1 >> 32) ^ counter.w[1] ^ key0, (uint32_t)product1,
                    (uint32_t)(product0 >> 32) ^ counter.w[3] ^ key1, (uint32_t)product0}};
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return counter;
}

// The top 53 bits of two words as a number in [0, 1).
__device__ __forceinline__ double unit(uint32_t low, uint32_t high) {
    return (double)(((uint64_t)high << 32 | low) >> 11) * (1.0 / 9007199254740992.0);
}

// A thread makes one block of four words into two normals: radius from the first 64 bits, angle from the last.
extern "C" __global__ void philox_normal(float* out, uint64_t n, uint64_t seed, uint32_t purpose, uint64_t index) {
    const uint64_t block = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x, i = 2 * block;
    if (i >= n) return;
    const Words counter{{(uint32_t)block, purpose, (uint32_t)index, (uint32_t)(index >> 32)}};
    const Words words = philox4x32_10(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
    // 1 - u lies in (0, 1], so that the logarithm is finite.
    const double radius = sqrt(-2.0 * log(1.0 - unit(words.w[0], words.w[1])));
    double sine, cosine;
    sincos(6.283185307179586 * unit(words.w[2], words.w[3]), &sine, &cosine);
    out[i] = (float)(radius * cosine);
    if (i + 1 < n) out[i + 1] = (float)(radius * sine);
}
