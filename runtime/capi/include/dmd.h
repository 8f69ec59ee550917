// The C ABI of dmd-runtime: pictures from a generator that `dmd export --onnx` wrote. Made by cbindgen from
// runtime/capi/src by its test; docs/runtime.md is the guide.
//
// Every function may be called from any thread at any time. Each gives a dmd_status, 0 (DMD_STATUS_OK) where it did what it says;
// dmd_last_error() has the reason of the last failure on the calling thread, in a sentence. None ends the program: null
// pointers, wrong sizes and handles that are closed are errors, and so is a panic within.
//
// Ownership: a handle belongs to who opened it, until it is closed. Memory belongs to the caller, always; the library keeps
// no pointer that it is given beyond the call, but for the context of a watch. Text is UTF-8 and ends with a zero byte.
//
// A struct begins with its own size, so that later versions may add fields at its end: set it to sizeof the struct, and set
// everything else to zero before filling in what is wanted.
//
// A buffer for text or a PNG takes three arguments: `buffer` and `size` say where and how much, and `*needed` gets the
// bytes it takes (with the zero of a text). Where they do not fit, nothing is written, and the status is
// DMD_STATUS_BUFFER_TOO_SMALL; with a null buffer of size 0 the question alone is asked, and the status is DMD_STATUS_OK.

#ifndef DMD_H
#define DMD_H

#include <stddef.h>
#include <stdint.h>

// The version of this header: of functions, structs and numbers. A library with the same number takes a program that was
// compiled with this header; it is raised when something is taken away or changed, not when something is added.
#define DMD_ABI_VERSION 1

// The purpose of the noise that becomes pictures.
#define DMD_NOISE_PICTURE 0

// The purpose of the noise between the passes of a file of several, plus the number of the pass, from 1.
#define DMD_NOISE_REFINING 256

// How a call went.
typedef enum dmd_status {
  // It did what it says.
  DMD_STATUS_OK = 0,
  // A pointer is null or not aligned, a size is wrong, a text is not UTF-8, or a struct is none of this library's.
  DMD_STATUS_BAD_ARGUMENT = 1,
  // No open generator or watch has this handle: it was closed, or never opened.
  DMD_STATUS_BAD_HANDLE = 2,
  // The caller's buffer is too small for a text or a PNG; what it takes was written to `needed`.
  DMD_STATUS_BUFFER_TOO_SMALL = 3,
  // The file cannot be read, is broken, or is not one that `dmd export` wrote.
  DMD_STATUS_BAD_FILE = 4,
  // No engine can run the file: no usable library, one that is too old, or one that refuses the file.
  DMD_STATUS_NO_ENGINE = 5,
  // The request does not suit the file: a label, a number of pictures, a size of noise or of the pictures' buffer.
  DMD_STATUS_BAD_REQUEST = 6,
  // The engine failed, or gave values that are not finite.
  DMD_STATUS_RUN_FAILED = 7,
  // The system has no memory for it.
  DMD_STATUS_NO_MEMORY = 8,
  // Somebody cancelled it.
  DMD_STATUS_CANCELLED = 9,
  // A fault of the library itself, which was stopped at its border; the handle may still be used.
  DMD_STATUS_PANIC = 10,
  // Anything else; the message says what.
  DMD_STATUS_OTHER = 11,
} dmd_status;

// Which engine runs a file.
typedef enum dmd_engine {
  // ONNX Runtime where its library is found, else tract, which is slower; the JSON's `engine.warning` then says so.
  DMD_ENGINE_AUTO = 0,
  // ONNX Runtime.
  DMD_ENGINE_ONNX_RUNTIME = 1,
  // tract, which is in this library and needs no other.
  DMD_ENGINE_TRACT = 2,
} dmd_engine;

// How a file is run.
typedef struct dmd_options {
  // `sizeof(dmd_options)`.
  size_t size;
  // Threads within one operator; 0 for as many as the machine offers.
  size_t threads;
  // ONNX Runtime's library, or the folder that holds it; null searches: the variable ORT_DYLIB_PATH, beside the program,
  // the cache folder, Python's packages, the system.
  const char *library;
  // A `dmd_engine`.
  uint32_t engine;
  // 1 where an accelerator of the list must run every node; 0 where the processor runs what they leave, or all.
  uint32_t require_accelerator;
  // What may run the graph in the place of the processor, in the order in which they are asked: a JSON array, or null for
  // none. docs/runtime.md has its words; `dmd_describe_json` tells which was taken, and why not the others.
  const char *accelerators;
  // 1 where ONNX Runtime is to hold less memory, for a quarter more time; 0 otherwise.
  uint32_t low_memory;
} dmd_options;

// An open file, ready to make pictures from any number of threads at once. 0 is none. Numbers are never given out twice in
// a process, so that one which was closed is an error wherever it is used.
typedef uint64_t dmd_generator;

// What a file says of itself.
typedef struct dmd_info {
  // `sizeof(dmd_info)`.
  size_t size;
  // Colours of a picture: 1 for grey, 3 for red, green and blue.
  size_t channels;
  // Rows of a picture.
  size_t height;
  // Columns of a picture.
  size_t width;
  // Pictures in one call of the engine; a request may be for any number.
  size_t batch;
  // Classes; 0 where the file takes no labels.
  size_t n_classes;
  // Passes that make a picture.
  size_t n_passes;
} dmd_info;

// Cancels a request, and tells how far it is. 0 is none.
typedef uint64_t dmd_watch;

// Which pictures to make.
typedef struct dmd_request {
  // `sizeof(dmd_request)`.
  size_t size;
  // Picture `i` depends on the seed, on `i` and on its label, not on the batch it is made in.
  uint64_t seed;
  // The number of pictures, 1 at least, which may differ from the file's own batch.
  size_t batch;
  // `n_labels` classes: one for all pictures, or one for each. Null with `n_labels` 0: a generator with classes goes
  // through them in turn.
  const int64_t *labels;
  // 0, 1 or `batch`.
  size_t n_labels;
  // A watch, or 0.
  dmd_watch watch;
} dmd_request;

// Called at the beginning of a request and after each pass of each part of it, on the thread that makes the pictures, with
// the watch's context: of `total` passes of all pictures together `done` are done. It must return (no longjmp, no C++
// exception); it may call any function of this library.
typedef void (*dmd_on_progress)(void *context, size_t done, size_t total);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the ABI that the library has, to compare with `DMD_ABI_VERSION`.
uint32_t dmd_abi_version(void);

// The version of dmd-runtime. The text is the library's, and stays for as long as it is loaded.
const char *dmd_version(void);

// Opens a file that `dmd export --onnx` or `dmd ort` wrote. `options` may be null: ONNX Runtime where it is found, all
// threads. The handle in `*generator` is the caller's, to close by `dmd_close`; on failure it is 0.
//
// # Safety
//
// `path` is null or a text, `options` null or such a struct, `generator` null or room for a handle.
enum dmd_status dmd_open(const char *path, const struct dmd_options *options, dmd_generator *generator);

// Opens the `n` bytes of such a file, whose weights must be in it: an asset, or what an app was linked with. The bytes are
// copied as far as they are needed. Otherwise as `dmd_open`.
//
// # Safety
//
// `bytes` is null or points to `n` bytes; the rest as of `dmd_open`.
enum dmd_status dmd_open_bytes(const uint8_t *bytes,
                               size_t n,
                               const struct dmd_options *options,
                               dmd_generator *generator);

// Closes a generator. Its memory is freed now, or by the last call on another thread that is using it. Closing it again is
// an error, `DMD_STATUS_BAD_HANDLE`, and does nothing.
enum dmd_status dmd_close(dmd_generator generator);

// Runs the engine once and throws the output away, so that the first picture need not wait for what an engine does once.
enum dmd_status dmd_warm_up(dmd_generator generator);

// Writes what the file says of itself into `*info`, whose `size` is set.
//
// # Safety
//
// `info` is null or such a struct.
enum dmd_status dmd_describe(dmd_generator generator, struct dmd_info *info);

// Writes all that is known as JSON: `{"file": {…}, "engine": {…}, "placement": {…}}`: the file's
// description, the engine, and which accelerator runs it, how that was proven, and why no other does.
//
// # Safety
//
// `buffer` is null or room for `size` bytes, `needed` null or room for a number.
enum dmd_status dmd_describe_json(dmd_generator generator, char *buffer, size_t size, size_t *needed);

// Writes, as a JSON array, which engines there are here, their versions, and of each that cannot be used the reason.
// `library` is as in `dmd_options`, and may be null.
//
// # Safety
//
// `library` is null or a text; the rest as of `dmd_describe_json`.
enum dmd_status dmd_engines_json(const char *library, char *buffer, size_t size, size_t *needed);

// Writes the name of a class, from 0 to `n_classes - 1`.
//
// # Safety
//
// As of `dmd_describe_json`.
enum dmd_status dmd_class_name(dmd_generator generator, int64_t label, char *buffer, size_t size, size_t *needed);

// Finds the class with this name, or this number in digits.
//
// # Safety
//
// `name` is null or a text, `label` null or room for a number.
enum dmd_status dmd_find_class(dmd_generator generator, const char *name, int64_t *label);

// Makes pictures as f32 `(batch, channels, height, width)`, about [-1, 1]. `n` is the number of values, no more and no less.
//
// # Safety
//
// `request` is null or such a struct whose labels are as many as it says, `values` null or room for `n` values that
// nobody else uses during the call.
enum dmd_status dmd_generate_f32(dmd_generator generator,
                                 const struct dmd_request *request,
                                 float *values,
                                 size_t n);

// Makes pictures as bytes `(batch, height, width, channels)`. `n` is the number of bytes, no more and no less.
//
// # Safety
//
// As of `dmd_generate_f32`.
enum dmd_status dmd_generate_u8(dmd_generator generator, const struct dmd_request *request, uint8_t *pixels, size_t n);

// Makes pictures as bytes `(batch, height, width, 4)`, red, green, blue and alpha, as screens take them; of a file of 1 to
// 4 channels. Opaque where the file has no alpha. `n` is the number of bytes, no more and no less.
//
// # Safety
//
// As of `dmd_generate_f32`.
enum dmd_status dmd_generate_rgba(dmd_generator generator,
                                  const struct dmd_request *request,
                                  uint8_t *pixels,
                                  size_t n);

// Makes pictures of the caller's own unit normal noise, f32 `(batch, channels, height, width)`, as f32 of the same size:
// `n` values each. `labels` are one for each picture, or none (null, 0) where the file has no classes. `seed` is that of the
// noise between the passes of a file of several.
//
// # Safety
//
// `noise` and `labels` are null or as many as is said, `values` null or room for `n` values that nobody else uses during
// the call, and that are not the noise.
enum dmd_status dmd_run(dmd_generator generator,
                        const float *noise,
                        const int64_t *labels,
                        size_t n_labels,
                        uint64_t seed,
                        float *values,
                        size_t n);

// Makes a watch for requests. `on_progress` may be null, for one that only cancels; `context` is handed to it as it is. The
// handle in `*watch` is the caller's, to close by `dmd_close_watch`; on failure it is 0.
//
// # Safety
//
// `on_progress` may be called with `context` on any thread that makes pictures with this watch, until the last of these
// requests has returned. `watch` is null or room for a handle.
enum dmd_status dmd_open_watch(dmd_on_progress on_progress,
                               void *context,
                               dmd_watch *watch);

// Cancels every request with this watch: each ends with `DMD_STATUS_CANCELLED`, after the pass that is under way, whose result is
// dropped; no accelerator stops within a pass. A request that is begun later with it ends at once.
enum dmd_status dmd_cancel(dmd_watch watch);

// Closes a watch. A request that is under way keeps it, and can no longer be cancelled.
enum dmd_status dmd_close_watch(dmd_watch watch);

// Writes the first `n` unit normals of the stream (seed, purpose, index), which docs/noise.md defines: with the purpose
// `DMD_NOISE_PICTURE`, the noise of picture number `index` of a seed.
//
// # Safety
//
// `values` is null or room for `n` values that nobody else uses during the call.
enum dmd_status dmd_noise(uint64_t seed, uint32_t purpose, uint64_t index, float *values, size_t n);

// Writes the PNG file of one picture, bytes `(height, width, channels)` with 1 to 4 channels: grey, grey with alpha, RGB or
// RGBA, as `dmd_generate_u8` and `dmd_generate_rgba` give them. A buffer of `height * width * channels + height + 1024`
// bytes is nearly always enough.
//
// # Safety
//
// `pixels` is null or points to so many bytes, `buffer` is null or room for `size` bytes, `needed` null or room for a
// number.
enum dmd_status dmd_png(const uint8_t *pixels,
                        uint32_t height,
                        uint32_t width,
                        uint32_t channels,
                        uint8_t *buffer,
                        size_t size,
                        size_t *needed);

// The reason why the last function that failed on this thread did so, in one sentence, or an empty text where none has.
// The text is the library's, and stays until the next failure on this thread or the thread's end: copy it to keep it.
const char *dmd_last_error(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DMD_H */
