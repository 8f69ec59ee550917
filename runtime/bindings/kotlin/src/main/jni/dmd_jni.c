/* Native.kt's functions over dmd.h. Texts cross as bytes of UTF-8, because the JVM's own native strings are not UTF-8; a
 * failure is thrown here, because its message belongs to the thread. Buffers are direct: nothing is copied. */
#include "dmd.h"

#include <jni.h>
#include <stdlib.h>
#include <string.h>

static JavaVM *vm;
static jclass native_class, exception_class;
static jmethodID exception_new, on_progress_id;

JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM *loading, void *reserved) {
    (void)reserved;
    JNIEnv *env;
    vm = loading;
    if ((*vm)->GetEnv(vm, (void **)&env, JNI_VERSION_1_6) != JNI_OK) return JNI_ERR;
    jclass native = (*env)->FindClass(env, "dmd/runtime/Native");
    jclass exception = native ? (*env)->FindClass(env, "dmd/runtime/DmdException") : NULL;
    if (!exception) return JNI_ERR;
    native_class = (*env)->NewGlobalRef(env, native);
    exception_class = (*env)->NewGlobalRef(env, exception);
    exception_new = (*env)->GetMethodID(env, exception, "<init>", "(I[B)V");
    on_progress_id = (*env)->GetStaticMethodID(env, native, "onProgress", "(JJJ)V");
    return native_class && exception_class && exception_new && on_progress_id ? JNI_VERSION_1_6 : JNI_ERR;
}

static jbyteArray bytes_of(JNIEnv *env, const void *bytes, size_t n) {
    jbyteArray array = (*env)->NewByteArray(env, (jsize)n);
    if (array) (*env)->SetByteArrayRegion(env, array, 0, (jsize)n, bytes);
    return array;
}

/* Throws what the last call failed of. */
static void throw_status(JNIEnv *env, dmd_status status) {
    const char *message = dmd_last_error();
    jbyteArray text = bytes_of(env, message, strlen(message));
    jobject exception = text ? (*env)->NewObject(env, exception_class, exception_new, (jint)status, text) : NULL;
    if (exception) (*env)->Throw(env, exception);
}

static void throw_new(JNIEnv *env, const char *class_name, const char *message) {
    jclass class = (*env)->FindClass(env, class_name);
    if (class) (*env)->ThrowNew(env, class, message);
}

/* Whether it is done; throws where not. */
static int done(JNIEnv *env, dmd_status status) {
    if (status != DMD_STATUS_OK) throw_status(env, status);
    return status == DMD_STATUS_OK;
}

/* A text that is to be freed, or null where there is none; `*ok` is 0 where something was thrown. */
static char *text_of(JNIEnv *env, jbyteArray bytes, int *ok) {
    if (!bytes) return NULL;
    jsize n = (*env)->GetArrayLength(env, bytes);
    char *text = malloc((size_t)n + 1);
    if (!text) {
        throw_new(env, "java/lang/OutOfMemoryError", "a text");
        *ok = 0;
        return NULL;
    }
    (*env)->GetByteArrayRegion(env, bytes, 0, n, (jbyte *)text);
    text[n] = 0;
    return text;
}

/* The memory of a direct buffer; null, and thrown, where it is none. */
static void *memory_of(JNIEnv *env, jobject buffer, size_t *n) {
    void *memory = buffer ? (*env)->GetDirectBufferAddress(env, buffer) : NULL;
    if (memory) *n = (size_t)(*env)->GetDirectBufferCapacity(env, buffer);
    else throw_new(env, "java/lang/IllegalArgumentException", "the buffer is not direct: ByteBuffer.allocateDirect");
    return memory;
}

static dmd_options options_of(const char *library, const char *accelerators, jint engine, jint threads, jboolean require,
                              jboolean low_memory) {
    dmd_options options = {0};
    options.size = sizeof options;
    options.threads = (size_t)threads;
    options.library = library;
    options.engine = (uint32_t)engine;
    options.require_accelerator = require == JNI_TRUE;
    options.accelerators = accelerators;
    options.low_memory = low_memory == JNI_TRUE;
    return options;
}

#define NATIVE(type, name) JNIEXPORT type JNICALL Java_dmd_runtime_Native_##name

NATIVE(jint, abiVersion)(JNIEnv *env, jclass class) {
    (void)env, (void)class;
    return dmd_abi_version() == DMD_ABI_VERSION ? (jint)DMD_ABI_VERSION : -1;
}

NATIVE(jlong, open)(JNIEnv *env, jclass class, jbyteArray path, jbyteArray library, jbyteArray accelerators, jint engine,
                    jint threads, jboolean require, jboolean low_memory) {
    (void)class;
    int ok = 1;
    dmd_generator generator = 0;
    char *path_text = text_of(env, path, &ok), *library_text = ok ? text_of(env, library, &ok) : NULL;
    char *list = ok ? text_of(env, accelerators, &ok) : NULL;
    if (ok) {
        dmd_options options = options_of(library_text, list, engine, threads, require, low_memory);
        done(env, dmd_open(path_text, &options, &generator));
    }
    free(path_text);
    free(library_text);
    free(list);
    return (jlong)generator;
}

NATIVE(jlong, openBytes)(JNIEnv *env, jclass class, jobject buffer, jbyteArray library, jbyteArray accelerators, jint engine,
                         jint threads, jboolean require, jboolean low_memory) {
    (void)class;
    int ok = 1;
    size_t n;
    dmd_generator generator = 0;
    const uint8_t *bytes = memory_of(env, buffer, &n);
    if (!bytes) return 0;
    char *library_text = text_of(env, library, &ok), *list = ok ? text_of(env, accelerators, &ok) : NULL;
    if (ok) {
        dmd_options options = options_of(library_text, list, engine, threads, require, low_memory);
        done(env, dmd_open_bytes(bytes, n, &options, &generator));
    }
    free(library_text);
    free(list);
    return (jlong)generator;
}

NATIVE(void, close)(JNIEnv *env, jclass class, jlong generator) {
    (void)class;
    done(env, dmd_close((dmd_generator)generator));
}

NATIVE(void, warmUp)(JNIEnv *env, jclass class, jlong generator) {
    (void)class;
    done(env, dmd_warm_up((dmd_generator)generator));
}

/* channels, height, width, batch, classes, passes. */
NATIVE(jlongArray, describe)(JNIEnv *env, jclass class, jlong generator) {
    (void)class;
    dmd_info info = {0};
    info.size = sizeof info;
    if (!done(env, dmd_describe((dmd_generator)generator, &info))) return NULL;
    const jlong values[] = {(jlong)info.channels, (jlong)info.height,    (jlong)info.width,
                            (jlong)info.batch,    (jlong)info.n_classes, (jlong)info.n_passes};
    jlongArray array = (*env)->NewLongArray(env, 6);
    if (array) (*env)->SetLongArrayRegion(env, array, 0, 6, values);
    return array;
}

/* A text or a PNG: asked for its size, then for itself. */
#define GIVE(env, type, last, call)                                                \
    size_t needed = 0;                                                             \
    type *buffer = NULL;                                                           \
    size_t size = 0;                                                               \
    if (!done(env, call)) return NULL;                                             \
    size = needed;                                                                 \
    buffer = malloc(size);                                                         \
    jbyteArray array = NULL;                                                       \
    if (!buffer) throw_new(env, "java/lang/OutOfMemoryError", "a text or a PNG");  \
    else if (done(env, call)) array = bytes_of(env, buffer, needed - (last));      \
    free(buffer);                                                                  \
    return array

NATIVE(jbyteArray, describeJson)(JNIEnv *env, jclass class, jlong generator) {
    (void)class;
    GIVE(env, char, 1, dmd_describe_json((dmd_generator)generator, buffer, size, &needed));
}

NATIVE(jbyteArray, className)(JNIEnv *env, jclass class, jlong generator, jlong label) {
    (void)class;
    GIVE(env, char, 1, dmd_class_name((dmd_generator)generator, label, buffer, size, &needed));
}

NATIVE(jbyteArray, png)(JNIEnv *env, jclass class, jobject pixels, jint height, jint width, jint channels) {
    (void)class;
    size_t n;
    const uint8_t *bytes = memory_of(env, pixels, &n);
    if (!bytes) return NULL;
    if (height < 0 || width < 0 || channels < 0 || n != (size_t)height * (size_t)width * (size_t)channels) {
        throw_new(env, "java/lang/IllegalArgumentException", "the buffer does not hold height * width * channels bytes");
        return NULL;
    }
    GIVE(env, uint8_t, 0,
         dmd_png(bytes, (uint32_t)height, (uint32_t)width, (uint32_t)channels, buffer, size, &needed));
}

NATIVE(jlong, findClass)(JNIEnv *env, jclass class, jlong generator, jbyteArray name) {
    (void)class;
    int ok = 1;
    int64_t label = -1;
    char *text = text_of(env, name, &ok);
    if (ok) done(env, dmd_find_class((dmd_generator)generator, text, &label));
    free(text);
    return label;
}

/* The labels to be released, or null where there are none; `*ok` is 0 where something was thrown. */
static jlong *labels_of(JNIEnv *env, jlongArray labels, size_t *n, int *ok) {
    *n = (size_t)(*env)->GetArrayLength(env, labels);
    jlong *values = (*env)->GetLongArrayElements(env, labels, NULL);
    *ok = values != NULL;
    return values;
}

/* layout: 0 f32, 1 u8, 2 rgba. */
NATIVE(void, generate)(JNIEnv *env, jclass class, jlong generator, jint layout, jlong seed, jint batch, jlongArray labels,
                       jlong watch, jobject buffer) {
    (void)class;
    int ok;
    size_t n, n_labels;
    void *memory = memory_of(env, buffer, &n);
    if (!memory) return;
    jlong *label_values = labels_of(env, labels, &n_labels, &ok);
    if (!ok) return;
    dmd_request request = {0};
    request.size = sizeof request;
    request.seed = (uint64_t)seed;
    request.batch = (size_t)batch;
    request.labels = (const int64_t *)label_values;
    request.n_labels = n_labels;
    request.watch = (dmd_watch)watch;
    dmd_status status;
    if (layout == 0) status = dmd_generate_f32((dmd_generator)generator, &request, memory, n / sizeof(float));
    else if (layout == 1) status = dmd_generate_u8((dmd_generator)generator, &request, memory, n);
    else status = dmd_generate_rgba((dmd_generator)generator, &request, memory, n);
    (*env)->ReleaseLongArrayElements(env, labels, label_values, JNI_ABORT);
    /* What the JVM itself threw in on_progress (no memory, no stack) comes first. */
    if (!(*env)->ExceptionCheck(env)) done(env, status);
}

NATIVE(void, run)(JNIEnv *env, jclass class, jlong generator, jobject noise, jlongArray labels, jlong seed, jobject values) {
    (void)class;
    int ok;
    size_t n, n_values, n_labels;
    const float *from = memory_of(env, noise, &n);
    float *to = from ? memory_of(env, values, &n_values) : NULL;
    if (!to) return;
    if (n != n_values) {
        throw_new(env, "java/lang/IllegalArgumentException", "noise and pictures have buffers of different sizes");
        return;
    }
    jlong *label_values = labels_of(env, labels, &n_labels, &ok);
    if (!ok) return;
    dmd_status status = dmd_run((dmd_generator)generator, from, (const int64_t *)label_values, n_labels, (uint64_t)seed,
                                to, n / sizeof(float));
    (*env)->ReleaseLongArrayElements(env, labels, label_values, JNI_ABORT);
    done(env, status);
}

NATIVE(void, noise)(JNIEnv *env, jclass class, jlong seed, jint purpose, jlong index, jobject values) {
    (void)class;
    size_t n;
    float *memory = memory_of(env, values, &n);
    if (memory) done(env, dmd_noise((uint64_t)seed, (uint32_t)purpose, (uint64_t)index, memory, n / sizeof(float)));
}

/* The context is a number that Native.kt knows, so that nothing is held here. The thread is one of the JVM's, which called. */
static void on_progress(void *context, size_t done_passes, size_t total) {
    JNIEnv *env;
    if ((*vm)->GetEnv(vm, (void **)&env, JNI_VERSION_1_6) != JNI_OK || (*env)->ExceptionCheck(env)) return;
    jlong id = (jlong)(intptr_t)context;
    (*env)->CallStaticVoidMethod(env, native_class, on_progress_id, id, (jlong)done_passes, (jlong)total);
}

NATIVE(jlong, openWatch)(JNIEnv *env, jclass class, jlong id) {
    (void)class;
    dmd_watch watch = 0;
    done(env, dmd_open_watch(id ? on_progress : NULL, (void *)(intptr_t)id, &watch));
    return (jlong)watch;
}

NATIVE(void, cancel)(JNIEnv *env, jclass class, jlong watch) {
    (void)class;
    done(env, dmd_cancel((dmd_watch)watch));
}

NATIVE(void, closeWatch)(JNIEnv *env, jclass class, jlong watch) {
    (void)class;
    done(env, dmd_close_watch((dmd_watch)watch));
}
