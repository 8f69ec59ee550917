/* Every function, used wrongly: misuse CLASSES-F32.onnx (3 classes, pictures of 3 x 8 x 6). Prints each message. */
#include "dmd.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int wrong = 0;

static void expect_at(int line, dmd_status found, dmd_status expected, const char *part) {
    const char *message = dmd_last_error();
    if (found != expected || (found && !strstr(message, part))) {
        printf("line %d: status %d, expected %d with \"%s\": %s\n", line, found, expected, part, message);
        wrong = 1;
    }
    if (found) printf("%d %s\n", found, message);
}
#define expect(call, status, part) expect_at(__LINE__, call, DMD_STATUS_##status, part)

int main(int argc, char **argv) {
    const char *model = argc > 1 ? argv[1] : "";
    dmd_options options = {.size = sizeof options, .engine = DMD_ENGINE_TRACT, .threads = 1};
    dmd_generator generator = 1;

    /* Opening. */
    expect(dmd_open(NULL, NULL, &generator), BAD_ARGUMENT, "path is null, expected a text");
    expect(generator == 0 ? DMD_STATUS_OK : DMD_STATUS_OTHER, OK, "");
    expect(dmd_open(model, NULL, NULL), BAD_ARGUMENT, "generator is null");
    expect(dmd_open("\xff\xfe", NULL, &generator), BAD_ARGUMENT, "path is not UTF-8");
    expect(dmd_open("no such file.onnx", NULL, &generator), BAD_FILE, "no such file.onnx: No such file");
    expect(dmd_open_bytes(NULL, 7, NULL, &generator), BAD_ARGUMENT, "bytes is null");
    expect(dmd_open_bytes(NULL, 0, NULL, &generator), BAD_FILE, "there is no graph in it");
    expect(dmd_open_bytes((const uint8_t *)model, SIZE_MAX, NULL, &generator), BAD_ARGUMENT, "no such memory");
    expect(dmd_open_bytes((const uint8_t *)"\x0a\x7fxx", 4, NULL, &generator), BAD_FILE, "not a whole ONNX file");
    expect(dmd_open_bytes((const uint8_t *)model, 4, NULL, NULL), BAD_ARGUMENT, "generator is null");
    dmd_options bad = options;
    bad.size = 0;
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "dmd_options.size is 0, expected sizeof(dmd_options)");
    bad.size = 1 << 20;
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "dmd_options.size is 1048576");
    bad = options;
    bad.engine = 9;
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "dmd_options.engine is 9, expected 0 to 2");
    bad = options;
    bad.require_accelerator = 2;
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "require_accelerator is 2, expected 0 or 1");
    bad = options;
    bad.low_memory = 7;
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "low_memory is 7, expected 0 or 1");
    bad = options;
    bad.accelerators = "[{\"warp\": {}}]";
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "unknown variant `warp`, expected one of `cpu`");
    bad.accelerators = "[{\"cuda\": {\"device\": 0, \"tf32\": true}}]";
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "unknown field `tf32`");
    bad.accelerators = "cpu";
    expect(dmd_open(model, &bad, &generator), BAD_ARGUMENT, "is no list of accelerators");
    bad = options;
    bad.engine = DMD_ENGINE_ONNX_RUNTIME;
    bad.library = "/nowhere/libonnxruntime.so";
    expect(dmd_open(model, &bad, &generator), NO_ENGINE, "/nowhere/libonnxruntime.so: does not exist");
    struct { dmd_options options; size_t newer; } longer = {{.size = sizeof longer, .engine = DMD_ENGINE_TRACT}, 0};
    expect(dmd_open(model, &longer.options, &generator), OK, "");
    expect(dmd_close(generator), OK, "");
    longer.newer = 1;
    expect(dmd_open(model, &longer.options, &generator), BAD_ARGUMENT, "fields that this library");

    /* Handles. */
    expect(dmd_close(0), BAD_HANDLE, "0 is no open generator");
    expect(dmd_close(UINT64_MAX), BAD_HANDLE, "18446744073709551615 is no open generator");
    dmd_generator closed = 0;
    expect(dmd_open(model, &options, &closed), OK, "");
    expect(dmd_close(closed), OK, "");
    expect(dmd_close(closed), BAD_HANDLE, "it was closed, or never opened");
    expect(dmd_open(model, &options, &generator), OK, "");
    expect(closed != generator ? DMD_STATUS_OK : DMD_STATUS_OTHER, OK, "");
    dmd_watch watch = 1;
    expect(dmd_open_watch(NULL, NULL, NULL), BAD_ARGUMENT, "watch is null");
    expect(dmd_open_watch(NULL, NULL, &watch), OK, "");
    expect(dmd_close(watch), BAD_HANDLE, "is no open generator");
    expect(dmd_cancel(generator), BAD_HANDLE, "is no open watch");
    expect(dmd_close_watch(generator), BAD_HANDLE, "is no open watch");

    /* Requests. */
    enum { N = 3 * 8 * 6, PIXELS = 8 * 6 * 4 };
    float values[2 * N + 1];
    uint8_t pixels[2 * PIXELS];
    dmd_request one = {.size = sizeof one, .batch = 1};
    dmd_request request = one;
    expect(dmd_generate_f32(closed, &one, values, N), BAD_HANDLE, "is no open generator");
    expect(dmd_generate_u8(0, &one, pixels, N), BAD_HANDLE, "is no open generator");
    expect(dmd_generate_rgba(watch, &one, pixels, N), BAD_HANDLE, "is no open generator");
    expect(dmd_generate_f32(generator, NULL, values, N), BAD_ARGUMENT, "dmd_request is null");
    expect(dmd_generate_f32(generator, &one, NULL, N), BAD_ARGUMENT, "values is null");
    expect(dmd_generate_u8(generator, &one, NULL, N), BAD_ARGUMENT, "pixels is null");
    expect(dmd_generate_rgba(generator, &one, NULL, PIXELS), BAD_ARGUMENT, "pixels is null");
    expect(dmd_generate_f32(generator, &one, (float *)((char *)values + 1), N), BAD_ARGUMENT, "not aligned to 4 bytes");
    expect(dmd_generate_f32(generator, &one, values, SIZE_MAX), BAD_ARGUMENT, "no such memory");
    expect(dmd_generate_f32(generator, &one, values, N - 1), BAD_REQUEST, "room for 143 values, the pictures are 144");
    expect(dmd_generate_f32(generator, &one, values, N + 1), BAD_REQUEST, "room for 145 values");
    expect(dmd_generate_f32(generator, &one, NULL, 0), BAD_REQUEST, "room for 0 values");
    expect(dmd_generate_u8(generator, &one, pixels, PIXELS), BAD_REQUEST, "the pictures are 144");
    expect(dmd_generate_rgba(generator, &one, pixels, N), BAD_REQUEST, "the pictures are 192");
    request.size = 3;
    expect(dmd_generate_f32(generator, &request, values, N), BAD_ARGUMENT, "dmd_request.size is 3");
    request = one;
    request.batch = 0;
    expect(dmd_generate_f32(generator, &request, values, 0), BAD_REQUEST, "batch is 0, expected at least 1");
    request.batch = SIZE_MAX;
    expect(dmd_generate_f32(generator, &request, values, N), BAD_REQUEST, "are too many");
    request = one;
    request.n_labels = 1;
    expect(dmd_generate_f32(generator, &request, values, N), BAD_ARGUMENT, "dmd_request.labels is null");
    int64_t labels[] = {3, -1, 2};
    request.labels = labels;
    expect(dmd_generate_f32(generator, &request, values, N), BAD_REQUEST, "label 3 is not a class of this file, expected 0 to 2");
    request.labels = labels + 1;
    expect(dmd_generate_f32(generator, &request, values, N), BAD_REQUEST, "label -1 is not a class");
    request.labels = labels + 2;
    request.n_labels = SIZE_MAX / 8 + 1;
    expect(dmd_generate_f32(generator, &request, values, N), BAD_ARGUMENT, "no such memory");
    int64_t three[] = {0, 1, 2};
    request.labels = three;
    request.n_labels = 3;
    request.batch = 2;
    expect(dmd_generate_f32(generator, &request, values, 2 * N), BAD_REQUEST, "found 3 labels, expected none, 1 or 2");
    request = one;
    request.watch = closed;
    expect(dmd_generate_f32(generator, &request, values, N), BAD_HANDLE, "is no open watch");
    request.watch = watch;
    expect(dmd_generate_f32(generator, &request, values, N), OK, "");
    expect(dmd_cancel(watch), OK, "");
    expect(dmd_generate_f32(generator, &request, values, N), CANCELLED, "the request was cancelled");
    expect(dmd_close_watch(watch), OK, "");
    expect(dmd_close_watch(watch), BAD_HANDLE, "is no open watch");
    expect(dmd_cancel(watch), BAD_HANDLE, "is no open watch");

    /* Noise of one's own. */
    float noise[N + 1];
    expect(dmd_noise(0, 0, 0, NULL, 4), BAD_ARGUMENT, "values is null");
    expect(dmd_noise(0, 0, 0, NULL, 0), OK, "");
    expect(dmd_noise(0, 0, 0, values, SIZE_MAX), BAD_ARGUMENT, "no such memory");
    expect(dmd_noise(7, DMD_NOISE_PICTURE, 0, noise, N), OK, "");
    expect(dmd_run(0, noise, labels + 2, 1, 0, values, N), BAD_HANDLE, "is no open generator");
    expect(dmd_run(generator, NULL, labels + 2, 1, 0, values, N), BAD_ARGUMENT, "noise is null");
    expect(dmd_run(generator, noise, NULL, 1, 0, values, N), BAD_ARGUMENT, "labels is null");
    expect(dmd_run(generator, noise, labels + 2, 1, 0, NULL, N), BAD_ARGUMENT, "values is null");
    expect(dmd_run(generator, noise, labels + 2, 1, 0, values, N - 1), BAD_REQUEST, "expected a multiple of 144");
    expect(dmd_run(generator, NULL, NULL, 0, 0, NULL, 0), BAD_REQUEST, "batch is 0");
    expect(dmd_run(generator, noise, NULL, 0, 0, values, N), BAD_REQUEST, "found 0 labels, expected one per picture, 1");
    expect(dmd_run(generator, noise, labels, 1, 0, values, N), BAD_REQUEST, "label 3 is not a class");
    uint32_t not_a_number = 0x7fc00000;
    memcpy(noise, &not_a_number, 4);
    expect(dmd_run(generator, noise, labels + 2, 1, 0, values, N), BAD_REQUEST, "the noise of picture 0 is not finite");

    /* Descriptions. */
    dmd_info info = {.size = 1};
    expect(dmd_describe(generator, NULL), BAD_ARGUMENT, "dmd_info is null");
    expect(dmd_describe(generator, &info), BAD_ARGUMENT, "dmd_info.size is 1");
    expect(dmd_describe(0, &info), BAD_HANDLE, "is no open generator");
    struct { dmd_info info; size_t newer; } longer_info = {{.size = sizeof longer_info}, 7};
    expect(dmd_describe(generator, &longer_info.info), OK, "");
    int described = longer_info.newer == 0 && longer_info.info.size == sizeof longer_info && longer_info.info.width == 6;
    expect(described ? DMD_STATUS_OK : DMD_STATUS_OTHER, OK, "");
    char text[64];
    size_t needed = 0;
    expect(dmd_class_name(generator, 3, text, sizeof text, &needed), BAD_REQUEST, "label 3 is not a class");
    expect(dmd_class_name(generator, -1, text, sizeof text, &needed), BAD_REQUEST, "label -1 is not a class");
    expect(dmd_class_name(generator, 0, NULL, 0, NULL), BAD_ARGUMENT, "buffer is null");
    expect(dmd_class_name(generator, 0, NULL, 9, &needed), BAD_ARGUMENT, "buffer is null");
    expect(dmd_class_name(generator, 0, NULL, 0, &needed), OK, "");
    strcpy(text, "kept");
    expect(dmd_class_name(generator, 0, text, needed - 1, NULL), BUFFER_TOO_SMALL, "expected at least");
    expect(strcmp(text, "kept") ? DMD_STATUS_OTHER : DMD_STATUS_OK, OK, "");
    expect(dmd_class_name(generator, 0, text, needed, NULL), OK, "");
    expect(dmd_class_name(closed, 0, text, sizeof text, &needed), BAD_HANDLE, "is no open generator");
    expect(dmd_describe_json(0, text, sizeof text, &needed), BAD_HANDLE, "is no open generator");
    expect(dmd_describe_json(generator, text, sizeof text, &needed), BUFFER_TOO_SMALL, "buffer has 64 bytes");
    char *json = malloc(needed);
    expect(dmd_describe_json(generator, json, needed, NULL), OK, "");
    expect(json && strstr(json, "\"engine\":{") && strlen(json) + 1 == needed ? DMD_STATUS_OK : DMD_STATUS_OTHER, OK, "");
    free(json);
    expect(dmd_engines_json("\xff", NULL, 0, &needed), BAD_ARGUMENT, "library is not UTF-8");
    expect(dmd_engines_json("/nowhere", NULL, 0, NULL), BAD_ARGUMENT, "buffer is null");
    int64_t label = 0;
    expect(dmd_find_class(generator, NULL, &label), BAD_ARGUMENT, "name is null");
    expect(dmd_find_class(generator, "0", NULL), BAD_ARGUMENT, "label is null");
    expect(dmd_find_class(generator, "nobody", &label), BAD_REQUEST, "no class of this file is named \"nobody\"");
    expect(dmd_find_class(0, "0", &label), BAD_HANDLE, "is no open generator");
    expect(dmd_warm_up(closed), BAD_HANDLE, "is no open generator");
    expect(dmd_warm_up(generator), OK, "");

    /* PNG. */
    expect(dmd_png(pixels, 8, 6, 5, pixels, 9, &needed), BAD_ARGUMENT, "1 to 4 channels, found 5");
    expect(dmd_png(pixels, 0, 6, 4, pixels, 9, &needed), BAD_ARGUMENT, "no picture of 0 x 6 pixels");
    expect(dmd_png(NULL, 8, 6, 4, pixels, 9, &needed), BAD_ARGUMENT, "pixels is null");
    expect(dmd_png(pixels, UINT32_MAX, UINT32_MAX, 4, NULL, 0, &needed), BAD_ARGUMENT, "pixels");
    memset(pixels, 7, sizeof pixels);
    expect(dmd_png(pixels, 8, 6, 4, NULL, 0, &needed), OK, "");
    expect(dmd_png(pixels, 8, 6, 4, (uint8_t *)text, 8, &needed), BUFFER_TOO_SMALL, "buffer has 8 bytes");

    expect(dmd_close(generator), OK, "");
    return wrong;
}
