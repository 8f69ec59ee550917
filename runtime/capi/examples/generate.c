/* One picture of an exported file as a PNG: generate MODEL.onnx OUT.png [SEED [CLASS]]
 *
 *   cargo build --release -p dmd-capi
 *   cc generate.c -I ../include -L ../../../target/release -ldmd_capi -o generate
 */
#include "dmd.h"

#include <stdio.h>
#include <stdlib.h>

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, dmd_last_error());
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: generate MODEL.onnx OUT.png [SEED [CLASS]]\n");
        return 2;
    }
    dmd_generator generator;
    if (dmd_open(argv[1], NULL, &generator)) return fail("dmd_open");

    dmd_info info = {.size = sizeof info};
    if (dmd_describe(generator, &info)) return fail("dmd_describe");

    int64_t label;
    dmd_request request = {.size = sizeof request, .batch = 1};
    if (argc > 3) request.seed = strtoull(argv[3], NULL, 10);
    if (argc > 4) {
        if (dmd_find_class(generator, argv[4], &label)) return fail("dmd_find_class");
        request.labels = &label;
        request.n_labels = 1;
    }
    size_t n = info.height * info.width * 4, size = n + info.height + 1024, needed;
    uint8_t *pixels = malloc(n), *png = malloc(size);
    if (!pixels || !png) return 1;
    if (dmd_generate_rgba(generator, &request, pixels, n)) return fail("dmd_generate_rgba");
    if (dmd_png(pixels, (uint32_t)info.height, (uint32_t)info.width, 4, png, size, &needed)) return fail("dmd_png");
    dmd_close(generator);

    FILE *file = fopen(argv[2], "wb");
    if (!file || fwrite(png, 1, needed, file) != needed || fclose(file)) {
        perror(argv[2]);
        return 1;
    }
    free(png);
    free(pixels);
    return 0;
}
