package dmd.runtime

import java.nio.ByteBuffer
import java.util.concurrent.ConcurrentHashMap

/** The functions of dmd_jni.c. Texts are UTF-8, buffers direct and as large as what they hold. Each throws [DmdException]. */
internal object Native {
    /** Who hears of which watch. */
    private val listeners = ConcurrentHashMap<Long, (Long, Long) -> Unit>()

    init {
        System.loadLibrary("dmd_jni")
        check(abiVersion() > 0) { "libdmd_capi is of another version than libdmd_jni" }
    }

    fun listen(id: Long, listener: (Long, Long) -> Unit) {
        listeners[id] = listener
    }

    fun forget(id: Long) {
        listeners.remove(id)
    }

    /** Called by dmd_jni.c; never throws. */
    @JvmStatic
    fun onProgress(id: Long, done: Long, total: Long) {
        listeners[id]?.invoke(done, total)
    }

    @JvmStatic
    external fun abiVersion(): Int

    @JvmStatic
    external fun open(
        path: ByteArray, library: ByteArray?, accelerators: ByteArray, engine: Int, threads: Int, require: Boolean,
        lowMemory: Boolean,
    ): Long

    @JvmStatic
    external fun openBytes(
        bytes: ByteBuffer, library: ByteArray?, accelerators: ByteArray, engine: Int, threads: Int, require: Boolean,
        lowMemory: Boolean,
    ): Long

    @JvmStatic
    external fun close(generator: Long)

    @JvmStatic
    external fun warmUp(generator: Long)

    @JvmStatic
    external fun describe(generator: Long): LongArray

    @JvmStatic
    external fun describeJson(generator: Long): ByteArray

    @JvmStatic
    external fun className(generator: Long, label: Long): ByteArray

    @JvmStatic
    external fun findClass(generator: Long, name: ByteArray): Long

    @JvmStatic
    external fun generate(
        generator: Long, layout: Int, seed: Long, batch: Int, labels: LongArray, watch: Long, buffer: ByteBuffer,
    )

    @JvmStatic
    external fun run(generator: Long, noise: ByteBuffer, labels: LongArray, seed: Long, values: ByteBuffer)

    @JvmStatic
    external fun noise(seed: Long, purpose: Int, index: Long, values: ByteBuffer)

    @JvmStatic
    external fun png(pixels: ByteBuffer, height: Int, width: Int, channels: Int): ByteArray

    @JvmStatic
    external fun openWatch(id: Long): Long

    @JvmStatic
    external fun cancel(watch: Long)

    @JvmStatic
    external fun closeWatch(watch: Long)
}
