import Foundation
import XCTest

@testable import DmdRuntime

/// `swift test`, with DMD_FIXTURES naming runtime/tests/fixtures.
final class GeneratorTests: XCTestCase {
    let fixtures = ProcessInfo.processInfo.environment["DMD_FIXTURES"] ?? "../../tests/fixtures"

    func testASeedMakesThePicturesOfRecord() throws {
        // onnxruntime 1.32.0 in a loop of numpy: see runtime/tests/runtime.rs, a_file_of_several_passes_runs_them_all.
        let expected: [Float] = [-0.54790473, -0.6076405, -0.49089473, -0.29027638, -0.40598375, -0.46325982]
        let generator = try Generator(path: fixtures + "/steps-f32.onnx")
        let values = try generator.floats(seed: (1 << 33) + 5, batch: 2, labels: [1, 0])
        for (value, expected) in zip(values, expected) { XCTAssertEqual(value, expected, accuracy: 1e-5) }
        XCTAssertEqual(values.reduce(0) { $0 + abs($1) }, 39.054005, accuracy: 1e-3)
    }

    func testAFileItsBytesAndThreadsMakeTheSamePicture() throws {
        let path = fixtures + "/classes-f32.onnx"
        let generator = try Generator(path: path, engine: .tract, threads: 1)
        XCTAssertEqual([generator.channels, generator.height, generator.width], [3, 8, 6])
        XCTAssertTrue(try generator.describe().contains("\"kind\":\"tract\""))
        let data = try Generator(data: Data(contentsOf: URL(fileURLWithPath: path)), engine: .tract)
        let label = try generator.label(generator.classes[2])
        XCTAssertEqual(label, 2)
        try generator.warmUp()
        let pictures = try generator.rgba(seed: 7, batch: 3, labels: [label])
        XCTAssertEqual(try data.rgba(seed: 7, batch: 3, labels: [2]), pictures)
        DispatchQueue.concurrentPerform(iterations: 8) { _ in
            XCTAssertEqual(try? generator.rgba(seed: 7, batch: 3, labels: [2]), pictures)
        }
        let png = try Generator.png(Array(pictures[..<192]), height: 8, width: 6)
        XCTAssertEqual(Array(png.prefix(4)), [0x89, 0x50, 0x4E, 0x47])
        XCTAssertEqual(try Generator.noise(seed: 0, index: 0, count: 2), [-1.6249634, -1.2683492])
    }

    func testAWatchHearsAndCancels() throws {
        let generator = try Generator(path: fixtures + "/steps-f32.onnx")
        final class Heard: @unchecked Sendable { var passes: [Int] = [] }
        let heard = Heard()
        _ = try generator.rgba(batch: 2, watch: Watch { done, _ in heard.passes.append(done) })
        XCTAssertEqual(heard.passes, [0, 2, 4, 6])
        let watch = try Watch()
        watch.cancel()
        XCTAssertThrowsError(try generator.rgba(watch: watch)) { XCTAssertTrue(($0 as! DmdError).isCancelled) }
    }

    func testWhatIsWrongIsSaid() throws {
        XCTAssertThrowsError(try Generator(path: "missing⭐.onnx")) {
            XCTAssertTrue("\($0)".contains("missing⭐.onnx: No such file"), "\($0)")
        }
        XCTAssertThrowsError(try Generator(data: Data()))
        XCTAssertThrowsError(try Generator(path: fixtures + "/plain-f32.onnx", library: "/nowhere")) {
            XCTAssertTrue("\($0)".contains("/nowhere"), "\($0)")
        }
        XCTAssertThrowsError(try Generator(path: fixtures + "/plain-f32.onnx", accelerators: "[\"warp\"]")) {
            XCTAssertTrue("\($0)".contains("unknown variant `warp`"), "\($0)")
        }
        let coreMl = "[{\"core_ml\": {}}]"
        XCTAssertThrowsError(try Generator(path: fixtures + "/plain-f32.onnx", accelerators: coreMl, require: true))
        let passedOver = try Generator(path: fixtures + "/plain-f32.onnx", accelerators: coreMl).describe()
        XCTAssertTrue(passedOver.contains("\"accelerator\":\"Core ML\""), passedOver)
        let generator = try Generator(path: fixtures + "/classes-f32.onnx")
        XCTAssertThrowsError(try generator.rgba(labels: [3])) {
            XCTAssertEqual("\($0)", "label 3 is not a class of this file, expected 0 to 2")
        }
        XCTAssertThrowsError(try generator.rgba(batch: 0))
        XCTAssertThrowsError(try generator.label("nobody"))
    }
}
