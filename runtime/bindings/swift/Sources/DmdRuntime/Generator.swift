import CDmd
import Foundation

/// What went wrong, in a sentence.
public struct DmdError: Error, CustomStringConvertible {
    public let status: dmd_status
    public let description: String

    /// Whether somebody cancelled it.
    public var isCancelled: Bool { status == DMD_STATUS_CANCELLED }
}

/// Which engine runs a file.
public enum Engine: UInt32 {
    case auto = 0
    case onnxRuntime = 1
    case tract = 2
}

/// Cancels the requests that are made with it, from any thread, and hears how far they are: passes that are done, and passes
/// that there will be, on the thread that makes the pictures.
public final class Watch: @unchecked Sendable {
    fileprivate let handle: dmd_watch
    /// The library has its address, for as long as a request holds this watch.
    private let listener: Listener

    public init(onProgress: @escaping @Sendable (_ done: Int, _ total: Int) -> Void = { _, _ in }) throws {
        listener = Listener(call: onProgress)
        var opened: dmd_watch = 0
        let context = Unmanaged.passUnretained(listener).toOpaque()
        try check(dmd_open_watch({ context, done, total in
            guard let context else { return }
            Unmanaged<Listener>.fromOpaque(context).takeUnretainedValue().call(done, total)
        }, context, &opened))
        handle = opened
    }

    deinit { dmd_close_watch(handle) }

    /// Each request ends with an error that `isCancelled`, after the pass that is under way.
    public func cancel() { dmd_cancel(handle) }

    private final class Listener: Sendable {
        let call: @Sendable (Int, Int) -> Void
        init(call: @escaping @Sendable (Int, Int) -> Void) { self.call = call }
    }
}

/// A file that `dmd export --onnx` wrote, ready to make pictures on any number of threads at once.
public final class Generator: @unchecked Sendable {
    private let handle: dmd_generator
    /// Colours of a picture: 1 for grey, 3 for red, green and blue.
    public let channels: Int
    public let height: Int
    public let width: Int
    /// The names of the classes, by label.
    public let classes: [String]

    /// Opens a file. `threads` 0 for all; `library` is ONNX Runtime's, or the folder that holds it; `accelerators` are what
    /// may run it in the place of the processor, as JSON (docs/runtime.md); `require`: one of them must run every node;
    /// `lowMemory`: ONNX Runtime is to hold less, for a quarter more time.
    public convenience init(
        path: String, engine: Engine = .auto, threads: Int = 0, library: String? = nil, accelerators: String = "[]",
        require: Bool = false, lowMemory: Bool = false
    ) throws {
        try self.init(engine, threads, library, accelerators, require, lowMemory) { dmd_open(path, $0, $1) }
    }

    /// Opens the bytes of such a file.
    public convenience init(
        data: Data, engine: Engine = .auto, threads: Int = 0, library: String? = nil, accelerators: String = "[]",
        require: Bool = false, lowMemory: Bool = false
    ) throws {
        try self.init(engine, threads, library, accelerators, require, lowMemory) { options, opened in
            data.withUnsafeBytes { bytes in
                dmd_open_bytes(bytes.baseAddress?.assumingMemoryBound(to: UInt8.self), bytes.count, options, opened)
            }
        }
    }

    private init(
        _ engine: Engine, _ threads: Int, _ library: String?, _ accelerators: String, _ require: Bool,
        _ lowMemory: Bool,
        open: (UnsafePointer<dmd_options>, UnsafeMutablePointer<dmd_generator>) -> dmd_status
    ) throws {
        precondition(threads >= 0, "threads are \(threads), expected 0 for all, or more")
        var opened: dmd_generator = 0
        try (library ?? "").withCString { text in
            var options = dmd_options()
            options.size = MemoryLayout<dmd_options>.size
            options.threads = threads
            options.library = library == nil ? nil : text
            options.engine = engine.rawValue
            options.require_accelerator = require ? 1 : 0
            options.low_memory = lowMemory ? 1 : 0
            try accelerators.withCString { list in
                options.accelerators = list
                try check(open(&options, &opened))
            }
        }
        handle = opened
        do {
            var info = dmd_info()
            info.size = MemoryLayout<dmd_info>.size
            try check(dmd_describe(opened, &info))
            (channels, height, width) = (info.channels, info.height, info.width)
            classes = try (0..<info.n_classes).map { label in
                try text { dmd_class_name(opened, Int64(label), $0, $1, $2) }
            }
        } catch {
            dmd_close(opened)
            throw error
        }
    }

    deinit { dmd_close(handle) }

    /// All that is known, `{"file": {…}, "engine": {…}, "placement": {…}}`.
    public func describe() throws -> String { try text { dmd_describe_json(handle, $0, $1, $2) } }

    /// The label of a class by its name, or its number in digits.
    public func label(_ name: String) throws -> Int64 {
        var label: Int64 = 0
        try check(dmd_find_class(handle, name, &label))
        return label
    }

    /// Runs the engine once, so that the first picture need not wait for what an engine does once.
    public func warmUp() throws { try check(dmd_warm_up(handle)) }

    /// Pictures 0 to `batch - 1` of a seed, f32 (N, C, H, W) about [-1, 1]. `labels` are classes, one for all pictures or one
    /// for each; without any, the classes in turn.
    public func floats(seed: UInt64 = 0, batch: Int = 1, labels: [Int64] = [], watch: Watch? = nil) throws -> [Float] {
        try generate(seed, batch, labels, watch, ofEach: channels * height * width, zero: 0) {
            dmd_generate_f32(handle, $0, $1, $2)
        }
    }

    /// The same as bytes (N, H, W, 4): red, green, blue and alpha, as `CGImage` takes them.
    public func rgba(seed: UInt64 = 0, batch: Int = 1, labels: [Int64] = [], watch: Watch? = nil) throws -> [UInt8] {
        try generate(seed, batch, labels, watch, ofEach: height * width * 4, zero: 0) {
            dmd_generate_rgba(handle, $0, $1, $2)
        }
    }

    private func generate<Value>(
        _ seed: UInt64, _ batch: Int, _ labels: [Int64], _ watch: Watch?, ofEach: Int, zero: Value,
        _ call: (UnsafePointer<dmd_request>, UnsafeMutablePointer<Value>?, Int) -> dmd_status
    ) throws -> [Value] {
        precondition(batch >= 0, "batch is \(batch), expected at least 1")
        var values = [Value](repeating: zero, count: batch * ofEach)
        try labels.withUnsafeBufferPointer { labels in
            var request = dmd_request()
            request.size = MemoryLayout<dmd_request>.size
            request.seed = seed
            request.batch = batch
            request.labels = labels.baseAddress
            request.n_labels = labels.count
            request.watch = watch?.handle ?? 0
            try values.withUnsafeMutableBufferPointer { try check(call(&request, $0.baseAddress, $0.count)) }
        }
        return withExtendedLifetime((self, watch)) { values }
    }

    /// The first `n` unit normals of the stream that docs/noise.md defines: by default those of picture `index`.
    public static func noise(seed: UInt64, index: UInt64, count n: Int, purpose: UInt32 = 0) throws -> [Float] {
        var values = [Float](repeating: 0, count: n)
        try check(dmd_noise(seed, purpose, index, &values, n))
        return values
    }

    /// A PNG file of one picture, bytes (H, W, C).
    public static func png(_ pixels: [UInt8], height: Int, width: Int, channels: Int = 4) throws -> Data {
        precondition(pixels.count == height * width * channels, "a picture has height * width * channels bytes")
        let sides = [height, width, channels].map(UInt32.init)
        return try Data(bytes { (buffer: UnsafeMutablePointer<UInt8>?, size, needed) in
            dmd_png(pixels, sides[0], sides[1], sides[2], buffer, size, needed)
        })
    }
}

private func check(_ status: dmd_status) throws {
    guard status == DMD_STATUS_OK else {
        throw DmdError(status: status, description: String(cString: dmd_last_error()))
    }
}

/// What a function gives to a buffer: asked for its size, then for itself.
private func bytes<Value: ExpressibleByIntegerLiteral>(
    _ call: (UnsafeMutablePointer<Value>?, Int, UnsafeMutablePointer<Int>?) -> dmd_status
) throws -> [Value] {
    var needed = 0
    try check(call(nil, 0, &needed))
    var values = [Value](repeating: 0, count: needed)
    try check(call(&values, needed, nil))
    return values
}

private func text(
    _ call: (UnsafeMutablePointer<CChar>?, Int, UnsafeMutablePointer<Int>?) -> dmd_status
) throws -> String {
    String(cString: try bytes(call))
}
