/* The noise of a seed as docs/noise.md defines it, in C99: include it, and link with -lm. C's own `log`, `sin` and `cos`
 * are used. Compile without -ffast-math. */
#ifndef DMD_NOISE_PORT_H
#define DMD_NOISE_PORT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { NOISE_PICTURE = 0, NOISE_REFINING = 0x100 };

/* Four words: block number `block` of the stream (seed, purpose, index). */
static inline void noise_block(uint64_t seed, uint32_t purpose, uint64_t index, uint32_t block, uint32_t words[4]) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = block, c1 = purpose, c2 = (uint32_t)index, c3 = (uint32_t)(index >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p = UINT64_C(0xD2511F53) * c0, q = UINT64_C(0xCD9E8D57) * c2;
        c0 = (uint32_t)(q >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)q;
        c2 = (uint32_t)(p >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p;
        k0 += UINT32_C(0x9E3779B9);
        k1 += UINT32_C(0xBB67AE85);
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

/* The top 53 bits of a 64-bit word as a number in [0, 1). */
static inline double noise_unit(uint32_t low, uint32_t high) {
    return (double)(((uint64_t)high << 32 | low) >> 11) * 0x1p-53;
}

/* The first n unit normals of the stream. */
static inline void noise_normals(uint64_t seed, uint32_t purpose, uint64_t index, float *values, size_t n) {
    const double tau = 6.283185307179586476925286766559;
    for (size_t i = 0; i < n; i += 2) {
        uint32_t w[4];
        noise_block(seed, purpose, index, (uint32_t)(i / 2), w);
        /* 1 - unit lies in (0, 1], so that the logarithm is finite. */
        double radius = sqrt(-2.0 * log(1.0 - noise_unit(w[0], w[1])));
        double angle = tau * noise_unit(w[2], w[3]);
        values[i] = (float)(radius * cos(angle));
        if (i + 1 < n) values[i + 1] = (float)(radius * sin(angle));
    }
}

#endif
