/* Answers a line `seed purpose index n` by two: n words, and the bits of n normals. */
#include "noise.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    uint64_t seed, index;
    uint32_t purpose;
    size_t n;
    while (scanf("%" SCNu64 " %" SCNu32 " %" SCNu64 " %zu", &seed, &purpose, &index, &n) == 4) {
        for (size_t i = 0; i < n; i++) {
            uint32_t words[4];
            noise_block(seed, purpose, index, (uint32_t)(i / 4), words);
            printf("%" PRIu32 " ", words[i % 4]);
        }
        float *values = malloc(n * sizeof *values + 1);
        if (!values) return 1;
        noise_normals(seed, purpose, index, values, n);
        printf("\n");
        for (size_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, &values[i], sizeof bits);
            printf("%" PRIu32 " ", bits);
        }
        printf("\n");
        free(values);
    }
    return 0;
}
