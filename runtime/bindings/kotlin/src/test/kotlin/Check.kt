// Runs on the desktop JVM: java -Djava.library.path=FOLDER -jar check.jar FIXTURES. Ends with the number of checks.

import dmd.runtime.DmdException
import dmd.runtime.DmdException.Status
import dmd.runtime.Engine
import dmd.runtime.Generator
import dmd.runtime.Layout
import dmd.runtime.Options
import dmd.runtime.Watch
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import java.util.concurrent.CompletableFuture
import kotlin.math.abs

var checks = 0

fun expect(holds: Boolean, what: () -> String) {
    checks += 1
    if (!holds) throw AssertionError(what())
}

inline fun <reified T : Throwable> refused(part: String, call: () -> Unit): T {
    val thrown = runCatching(call).exceptionOrNull()
    expect(thrown is T && part in thrown.message.orEmpty()) { "expected \"$part\", found $thrown" }
    return thrown as T
}

fun refused(status: Status, part: String, call: () -> Unit) {
    val found = refused<DmdException>(part, call).status
    expect(found == status) { "\"$part\" has status $found, expected $status" }
}

fun floats(buffer: ByteBuffer) = FloatArray(buffer.remaining() / 4).also { buffer.asFloatBuffer().get(it) }

fun bytes(buffer: ByteBuffer) = ByteArray(buffer.remaining()).also { buffer.duplicate().get(it) }

fun main(arguments: Array<String>) {
    val fixture = { name: String -> File(arguments[0], name).path }

    // onnxruntime 1.32.0 in a loop of numpy: see runtime/tests/runtime.rs, a_file_of_several_passes_runs_them_all.
    val steps = Generator(fixture("steps-f32.onnx"))
    val values = floats(steps.generate((1uL shl 33) + 5u, 2, longArrayOf(1, 0), Layout.F32))
    listOf(-0.54790473f, -0.6076405f, -0.49089473f, -0.29027638f, -0.40598375f, -0.46325982f).zip(values.toList())
        .forEach { (expected, value) -> expect(abs(value - expected) <= 1e-5f) { "$value, expected $expected" } }
    expect(abs(values.sumOf { abs(it.toDouble()) } - 39.054005) < 1e-3) { "${values.sumOf { abs(it.toDouble()) }}" }

    // Layouts, a mapped file, own noise, PNG.
    val path = fixture("classes-f32.onnx")
    val generator = Generator(path, Options(Engine.TRACT, threads = 1))
    expect(listOf(generator.channels, generator.height, generator.width) == listOf(3, 8, 6)) { generator.describe() }
    expect("\"kind\":\"tract\"" in generator.describe()) { generator.describe() }
    val mapped = FileChannel.open(File(path).toPath()).use { it.map(FileChannel.MapMode.READ_ONLY, 0, it.size()) }
    val second = Generator(mapped, Options(Engine.TRACT))
    val rgba = bytes(generator.generate(7u, 3))
    expect(rgba.contentEquals(bytes(second.generate(7u, 3)))) { "a file and its bytes make different pictures" }
    val pixels = bytes(generator.generate(7u, 3, layout = Layout.U8))
    val colours = rgba.filterIndexed { i, _ -> i % 4 < 3 }.toByteArray()
    expect(colours.contentEquals(pixels)) { "RGBA and RGB differ" }
    expect(rgba.filterIndexed { i, _ -> i % 4 == 3 }.all { it == (-1).toByte() }) { "a picture is not opaque" }
    val label = generator.label(generator.classes[2])
    expect(label == 2L) { "label $label" }
    val noise = Generator.noise(5u, 0u, 144)
    val one = floats(generator.generate(5u, 1, longArrayOf(2), Layout.F32))
    expect(generator.run(noise, longArrayOf(2)).contentEquals(one)) { "own noise makes another picture" }
    val png = Generator.png(generator.generate(), 8, 6)
    expect(png.take(4) == "\u0089PNG".map { it.code.toByte() }) { "no PNG: ${png.take(8)}" }
    generator.warmUp()

    // The code of docs/runtime.md.
    val page = bytes(picture(path))
    expect(page.contentEquals(bytes(second.generate(7u, 1, longArrayOf(0))))) { "the page makes another picture" }

    // A part of a larger buffer.
    val large = ByteBuffer.allocateDirect(10 + 192).order(ByteOrder.nativeOrder()).position(10)
    generator.generateInto(large, 7u, 1, LongArray(0), Layout.RGBA)
    expect(bytes(large).contentEquals(rgba.copyOf(192)) && large.get(0) == 0.toByte()) { "written elsewhere" }

    // Threads.
    val made = List(8) { CompletableFuture.supplyAsync { bytes(generator.generate(7u, 3)) } }
    made.forEach { expect(it.get().contentEquals(rgba)) { "threads make different pictures" } }

    // Watches.
    val heard = mutableListOf<Pair<Long, Long>>()
    Watch { done, total -> heard += done to total }.use { steps.generate(batch = 2, watch = it) }
    expect(heard == listOf(0L to 6L, 2L to 6L, 4L to 6L, 6L to 6L)) { "$heard" }
    Watch().use { watch ->
        watch.cancel()
        refused(Status.CANCELLED, "the request was cancelled") { steps.generate(watch = watch) }
    }
    Watch { _, _ -> error("the listener's own") }.use { watch ->
        refused<IllegalStateException>("the listener's own") { steps.generate(watch = watch) }
    }

    // What is wrong is said.
    refused(Status.BAD_FILE, "misßing⭐🦊.onnx: No such file") { Generator("misßing⭐🦊.onnx") }
    refused(Status.BAD_FILE, "not one of ours") { Generator(fixture("foreign.onnx")) }
    refused(Status.BAD_FILE, "the model in memory") { Generator(ByteBuffer.allocateDirect(7)) }
    refused(Status.NO_ENGINE, "/nowhere") { Generator(path, Options(library = "/nowhere")) }
    refused(Status.BAD_ARGUMENT, "unknown variant `warp`") { Generator(path, Options(accelerators = "[\"warp\"]")) }
    val coreMl = """[{"core_ml": {}}]"""
    refused(Status.NO_ENGINE, "") { Generator(path, Options(accelerators = coreMl, require = true)) }
    val passedOver = Generator(path, Options(accelerators = coreMl)).use { it.describe() }
    expect("\"accelerator\":\"Core ML\"" in passedOver) { passedOver }
    refused(Status.BAD_REQUEST, "label 3 is not a class") { generator.generate(labels = longArrayOf(3)) }
    refused(Status.BAD_REQUEST, "no class of this file is named \"nobody\"") { generator.label("nobody") }
    refused(Status.BAD_REQUEST, "batch is 0") { generator.generate(batch = 0) }
    refused(Status.BAD_REQUEST, "the pictures are 192") {
        generator.generateInto(ByteBuffer.allocateDirect(191), 0u, 1, LongArray(0), Layout.RGBA)
    }
    refused<IllegalArgumentException>("batch is -1") { generator.generate(batch = -1) }
    refused<IllegalArgumentException>("threads are -1") { Generator(path, Options(threads = -1)) }
    refused<IllegalArgumentException>("not direct") {
        generator.generateInto(ByteBuffer.allocate(192), 0u, 1, LongArray(0), Layout.RGBA)
    }
    refused<IllegalArgumentException>("read-only") {
        generator.generateInto(mapped, 0u, 1, LongArray(0), Layout.RGBA)
    }
    refused<IllegalArgumentException>("does not hold height * width") { Generator.png(ByteBuffer.allocateDirect(7), 8, 6) }
    generator.close()
    refused(Status.BAD_HANDLE, "is no open generator") { generator.generate() }
    refused(Status.BAD_HANDLE, "is no open generator") { generator.close() }
    println("$checks checks passed")
}
