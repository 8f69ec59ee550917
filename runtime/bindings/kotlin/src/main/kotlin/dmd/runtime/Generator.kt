package dmd.runtime

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.concurrent.atomic.AtomicLong

/** What went wrong, in a sentence. */
class DmdException(val status: Status, message: String) : RuntimeException(message) {
    /** Called by dmd_jni.c. */
    internal constructor(status: Int, message: ByteArray) :
        this(Status.entries.getOrElse(status) { Status.OTHER }, message.decodeToString())

    /** The kinds of failure, by their numbers in dmd.h. */
    enum class Status {
        OK, BAD_ARGUMENT, BAD_HANDLE, BUFFER_TOO_SMALL, BAD_FILE, NO_ENGINE, BAD_REQUEST, RUN_FAILED, NO_MEMORY, CANCELLED,
        PANIC, OTHER,
    }
}

/** Which engine runs a file. */
enum class Engine { AUTO, ONNX_RUNTIME, TRACT }

/**
 * How a file is run: [threads] 0 for all, [library] ONNX Runtime's library or the folder that holds it, [accelerators] what
 * may run it in the place of the processor, as JSON (docs/runtime.md), [require] whether one of them must run every node,
 * [lowMemory] whether ONNX Runtime is to hold less, for a quarter more time.
 */
data class Options(
    val engine: Engine = Engine.AUTO,
    val threads: Int = 0,
    val library: String? = null,
    val accelerators: String = "[]",
    val require: Boolean = false,
    val lowMemory: Boolean = false,
) {
    init {
        require(threads >= 0) { "threads are $threads, expected 0 for all, or more" }
    }
}

/** How pictures lie in a buffer. */
enum class Layout {
    /** float32 (N, C, H, W), about [-1, 1], in the machine's own order of bytes. */
    F32,

    /** Bytes (N, H, W, C). */
    U8,

    /** Bytes (N, H, W, 4), as `Bitmap.copyPixelsFromBuffer` takes them for ARGB_8888. */
    RGBA,
}

/**
 * Cancels the requests that are made with it, from any thread, and hears how far they are: [onProgress] gets passes that are
 * done and passes that there will be, on the thread that makes the pictures; what it throws cancels and is thrown there.
 */
class Watch(private val onProgress: ((done: Long, total: Long) -> Unit)? = null) : AutoCloseable {
    private val id = if (onProgress == null) 0 else NEXT.getAndIncrement()
    internal val handle = Native.openWatch(id)

    @Volatile
    internal var thrown: Throwable? = null

    init {
        if (onProgress != null) Native.listen(id, ::hear)
    }

    /** Each request ends with [DmdException.Status.CANCELLED], after the pass that is under way. */
    fun cancel() = Native.cancel(handle)

    /** A request that is under way goes on, and can no longer be cancelled. */
    override fun close() {
        Native.forget(id)
        Native.closeWatch(handle)
    }

    private fun hear(done: Long, total: Long) {
        try {
            onProgress?.invoke(done, total)
        } catch (failure: Throwable) {
            thrown = failure
            Native.cancel(handle)
        }
    }

    private companion object {
        val NEXT = AtomicLong(1)
    }
}

/** A file that `dmd export --onnx` wrote, ready to make pictures on any number of threads at once. */
class Generator private constructor(private val handle: Long) : AutoCloseable {
    /** Opens a file. */
    constructor(path: String, options: Options = Options()) : this(
        with(options) {
            Native.open(
                text(path), library?.let(::text), text(accelerators), engine.ordinal, threads, require, lowMemory,
            )
        },
    )

    /** Opens such a file's bytes: an asset that is mapped, without a copy. What is before the position is passed over. */
    constructor(bytes: ByteBuffer, options: Options = Options()) : this(
        with(options) {
            Native.openBytes(
                direct(bytes), library?.let(::text), text(accelerators), engine.ordinal, threads, require, lowMemory,
            )
        },
    )

    private val description = Native.describe(handle).map(Math::toIntExact)

    /** Colours: 1 for grey, 3 for red, green and blue. */
    val channels = description[0]
    val height = description[1]
    val width = description[2]

    /** The names of the classes, by label. */
    val classes: List<String> = List(description[4]) { Native.className(handle, it.toLong()).decodeToString() }

    /** All that is known, `{"file": {…}, "engine": {…}, "placement": {…}}`. */
    fun describe(): String = Native.describeJson(handle).decodeToString()

    /** The label of a class by its name, or its number in digits. */
    fun label(name: String): Long = Native.findClass(handle, text(name))

    /** Runs the engine once, so that the first picture need not wait for what an engine does once. */
    fun warmUp() = Native.warmUp(handle)

    /** Pictures 0 to [batch] - 1 of a seed, in a new direct buffer: see [generateInto]. */
    fun generate(
        seed: ULong = 0u, batch: Int = 1, labels: LongArray = LongArray(0), layout: Layout = Layout.RGBA, watch: Watch? = null,
    ): ByteBuffer {
        require(batch >= 0) { "batch is $batch, expected at least 1" }
        val ofEach = height.toLong() * width * if (layout == Layout.RGBA) 4 else channels
        val bytes = Math.multiplyExact(Math.multiplyExact(ofEach, batch.toLong()), if (layout == Layout.F32) 4 else 1)
        val buffer = allocate(Math.toIntExact(bytes))
        generateInto(buffer, seed, batch, labels, layout, watch)
        return buffer
    }

    /**
     * Writes pictures 0 to [batch] - 1 of a seed into a direct buffer, from its position to its limit, which must be as large
     * as they are. [labels] are classes, one for all pictures or one for each; without any, the classes in turn.
     */
    fun generateInto(
        buffer: ByteBuffer, seed: ULong, batch: Int, labels: LongArray, layout: Layout, watch: Watch? = null,
    ) {
        require(batch >= 0) { "batch is $batch, expected at least 1" }
        require(!buffer.isReadOnly) { "the buffer is read-only" }
        try {
            val into = direct(buffer)
            Native.generate(handle, layout.ordinal, seed.toLong(), batch, labels, watch?.handle ?: 0, into)
        } catch (failure: DmdException) {
            throw watch?.thrown ?: failure
        }
    }

    /** Pictures float32 (N, C, H, W) of unit normal noise of that shape, with one label for each where there are classes. */
    fun run(noise: FloatArray, labels: LongArray = LongArray(0), seed: ULong = 0u): FloatArray {
        val (from, to) = List(2) { allocate(Math.multiplyExact(noise.size, 4)) }
        from.asFloatBuffer().put(noise)
        Native.run(handle, from, labels, seed.toLong(), to)
        return FloatArray(noise.size).also { to.asFloatBuffer().get(it) }
    }

    /** Frees the generator; a call on another thread goes on to its end. Each may be closed once. */
    override fun close() = Native.close(handle)

    companion object {
        /** The first [n] unit normals of the stream that docs/noise.md defines: by default those of picture [index]. */
        fun noise(seed: ULong, index: ULong, n: Int, purpose: UInt = 0u): FloatArray {
            val values = allocate(Math.multiplyExact(n, 4))
            Native.noise(seed.toLong(), purpose.toInt(), index.toLong(), values)
            return FloatArray(n).also { values.asFloatBuffer().get(it) }
        }

        /** The bytes of a PNG file of one picture, bytes (H, W, C) in a direct buffer. */
        fun png(pixels: ByteBuffer, height: Int, width: Int, channels: Int = 4): ByteArray =
            Native.png(direct(pixels), height, width, channels)

        private fun allocate(bytes: Int) = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

        private fun direct(buffer: ByteBuffer): ByteBuffer {
            require(buffer.isDirect) { "the buffer is not direct: ByteBuffer.allocateDirect, or a mapped file" }
            return buffer.slice()
        }

        private fun text(text: String): ByteArray {
            require('\u0000' !in text) { "\"$text\" has a zero in it" }
            return text.encodeToByteArray()
        }
    }
}
