//! The public surface on small files, by every engine that is present. Where ONNX Runtime's library is not found its
//! part is skipped, with the reason printed.
//!
//! The fixtures follow the contract of `dmd export` and were written by this script (onnx 1.x, numpy), with
//! `python fixtures.py runtime/tests/fixtures [large.onnx]`:
//!
//! ```python
//! import json, sys, numpy as np, onnx
//! from onnx import TensorProto as T, helper as h, numpy_helper as nh
//!
//! def fixture(path, classes, output, batch=2, channels=3, height=8, width=6, hidden=4, groups=2, depth=0, clip=True, steps=(), **changes):
//!     rng = np.random.default_rng(0)
//!     weights, nodes = [], []
//!     def const(name, value, dtype=np.float32):
//!         weights.append(nh.from_array(np.asarray(value, dtype), name)); return name
//!     def node(op, inputs, out, **attributes):
//!         nodes.append(h.make_node(op, inputs, [out], name=out, **attributes)); return out
//!     def conv(x, out, cin, cout, stride=1):
//!         w = const(out + ".w", rng.normal(size=(cout, cin, 3, 3)) / np.sqrt(9 * cin))
//!         return node("Conv", [x, w, const(out + ".b", rng.normal(size=cout) * 0.1)], out,
//!                     kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[stride, stride])
//!     inputs = [h.make_tensor_value_info("noise", T.FLOAT, [batch, channels, height, width])]
//!     x = conv("noise", "conv_in", channels, hidden, stride=2)
//!     if classes:
//!         index = "row" if steps else "label"
//!         inputs.append(h.make_tensor_value_info(index, T.INT64, [batch]))
//!         table = const("pass_table" if steps else "classes", rng.normal(size=(len(classes) * max(1, len(steps)), hidden)))
//!         found = node("Gather", [table, index], "found" if steps else "row")
//!         x = node("Add", [x, node("Reshape", [found, const("s0", [batch, hidden, 1, 1], np.int64)], "row4")], "conditioned")
//!     # group norm as instance norm: (B, G, C/G*H*W), then a scale and a shift per channel
//!     flat = node("Reshape", [x, const("s1", [batch, groups, -1], np.int64)], "grouped")
//!     flat = node("InstanceNormalization", [flat, const("one", np.ones(groups)), const("zero", np.zeros(groups))], "normed", epsilon=1e-5)
//!     x = node("Reshape", [flat, const("s2", [batch, hidden, height // 2, width // 2], np.int64)], "ungrouped")
//!     x = node("Mul", [x, const("gamma", rng.normal(size=(1, hidden, 1, 1)))], "scaled")
//!     x = node("Add", [x, const("beta", rng.normal(size=(1, hidden, 1, 1)) * 0.1)], "shifted")
//!     x = node("Mul", [x, node("Sigmoid", [x], "gate")], "silu")
//!     for i in range(depth):
//!         x = conv(x, f"mid{i}", hidden, hidden)
//!     x = node("Resize", [x, const("roi", []), const("scales", [1, 1, 2, 2])], "upsampled", mode="nearest",
//!              coordinate_transformation_mode="asymmetric", nearest_mode="floor")
//!     x = conv(x, "conv_out" if clip else "image", hidden, channels)
//!     if output == "f32":
//!         if clip:
//!             node("Clip", [x, const("lo", -1.0), const("hi", 1.0)], "image")
//!         image = h.make_tensor_value_info("image", T.FLOAT, [batch, channels, height, width])
//!     else:
//!         x = node("Mul", [x, const("half", 127.5)], "widened")
//!         x = node("Add", [x, const("mid", 128.0)], "centred")
//!         x = node("Clip", [x, const("lo", 0.0), const("hi", 255.0)], "clipped")
//!         x = node("Transpose", [x], "nhwc", perm=[0, 2, 3, 1])
//!         node("Cast", [x], "image", to=T.UINT8)
//!         image = h.make_tensor_value_info("image", T.UINT8, [batch, height, width, channels])
//!     graph = h.make_graph(nodes, "generator", inputs, [image], weights)
//!     model = h.make_model(graph, producer_name="fixture", ir_version=8, opset_imports=[h.make_opsetid("", 17)])
//!     meta = {"dmd.format": "1", "dmd.version": "0.1.0", "dmd.dialect": "portable", "dmd.sigma": "2.5",
//!             "dmd.batch": str(batch), "dmd.channels": str(channels), "dmd.height": str(height), "dmd.width": str(width),
//!             "dmd.output": output, "dmd.classes": json.dumps(classes), "dmd.weights_sha256": "0" * 64} | changes
//!     if steps:
//!         meta |= {"dmd.format": "2", "dmd.sigma": str(steps[0]), "dmd.steps": json.dumps(steps)}
//!     h.set_model_props(model, {key: value for key, value in meta.items() if value})
//!     onnx.checker.check_model(model, full_check=True)
//!     onnx.save(model, path)
//!
//! names = ["circle", "square", "star"]
//! folder = sys.argv[1]
//! fixture(folder + "/classes-f32.onnx", names, "f32")
//! fixture(folder + "/classes-u8.onnx", names, "u8")
//! fixture(folder + "/plain-f32.onnx", [], "f32", batch=1, channels=1, clip=False)
//! fixture(folder + "/steps-f32.onnx", names[:2], "f32", channels=1, clip=False, steps=[8.0, 2.0, 0.5])
//! fixture(folder + "/foreign.onnx", [], "f32", batch=1, channels=1, **{"dmd.format": ""})
//! # runtime/examples/overhead.rs takes this one, of a real generator's size; it is too large to keep
//! if len(sys.argv) > 2:
//!     fixture(sys.argv[2], names, "f32", batch=1, height=32, width=32, hidden=128, groups=32, depth=10)
//! ```

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::Tiny;
use dmd_runtime::{
    EngineChoice, EngineKind, Error, Feed, FileInfo, Generator, Given, Images, Info, Module, Options, Output,
};
use dmd_runtime::{Request, Values, engines, picture_noise, quantize};
use ndarray::{Array4, s};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn load(name: &str, engine: EngineChoice) -> Generator {
    Generator::load(fixture(name), Options { engine, ..Options::default() }).unwrap()
}

/// The engines of this machine; says which are skipped and why.
fn present() -> Vec<EngineChoice> {
    let mut choices = Vec::new();
    for engine in engines(None) {
        match (engine.reason, engine.kind) {
            (Some(reason), kind) => eprintln!("skipped: {kind}: {reason}"),
            (None, EngineKind::OnnxRuntime) => choices.push(EngineChoice::OnnxRuntime),
            (None, EngineKind::Tract) => choices.push(EngineChoice::Tract),
        }
    }
    choices
}

fn request(seed: u64, labels: &[usize], batch: usize) -> Request {
    Request { seed, labels: labels.iter().map(|label| (*label).into()).collect(), batch, ..Request::default() }
}

fn error(result: Result<impl Sized, Error>) -> Error {
    result.err().expect("an error was expected")
}

/// Noise without a generator: ((0, 1, 2, ...) mod 13 - 6) / 4.
fn ramp(n: usize) -> Array4<f32> {
    let shape = (n, 3, 8, 6);
    Array4::from_shape_vec(shape, (0..n * 144).map(|i| ((i % 13) as f32 - 6.0) / 4.0).collect()).unwrap()
}

#[test]
fn low_memory_makes_the_same_pictures() {
    for engine in present() {
        for name in ["classes-f32.onnx", "plain-f32.onnx", "steps-f32.onnx"] {
            let options = Options { engine, low_memory: true, ..Options::default() };
            let low = Generator::load(fixture(name), options).unwrap();
            let request = Request { seed: 3, batch: 5, ..Request::default() };
            let (found, expected) = (low.generate(&request).unwrap(), load(name, engine).generate(&request).unwrap());
            let difference = (found.to_f32() - expected.to_f32()).mapv(f32::abs).fold(0.0f32, |a, b| a.max(*b));
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}

#[test]
fn the_files_own_description_is_read() {
    let info = Info::read(fixture("classes-u8.onnx")).unwrap();
    assert_eq!(info.shape(), [3, 8, 6]);
    assert_eq!((info.format, info.batch, info.sigmas.as_slice(), info.output), (1, 2, &[2.5][..], Output::U8));
    assert_eq!((info.dialect.as_str(), info.version.as_str(), info.file.opset), ("portable", "0.1.0", 17));
    assert_eq!(info.classes, ["circle", "square", "star"]);
    assert!(info.labelled() && info.file.nodes > 10 && info.file.weight_bytes > 500 && info.weights_sha256.len() == 64);
    assert_eq!([info.class("star"), info.class("1"), info.class("3"), info.class("")], [Some(2), Some(1), None, None]);
    assert!(!Info::read(fixture("plain-f32.onnx")).unwrap().labelled());
}

#[test]
fn outputs_are_those_of_the_python_runtime() {
    // onnxruntime 1.31.1: run(None, {"noise": ramp, "label": [0, 2]})[0].reshape(-1)[:6], and the sum of all |values|.
    let expected = [0.34961426, 0.35141593, 0.3475648, 0.23509914, 0.21957716, 0.17348102];
    for engine in present() {
        let images = load("classes-f32.onnx", engine).run(ramp(2).view(), &[0, 2]).unwrap();
        let values = images.as_f32().unwrap();
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-5, "{engine:?}: {value}, expected {expected}");
        }
        let sum: f64 = values.iter().map(|x| f64::from(x.abs())).sum();
        assert!((sum - 62.140_099).abs() < 1e-3, "{engine:?}: {sum}");

        let bytes = load("classes-u8.onnx", engine).run(ramp(2).view(), &[0, 2]).unwrap().to_u8();
        assert_eq!(bytes.as_slice().unwrap()[..6], [172, 146, 171, 172, 147, 152], "{engine:?}");
    }
}

#[test]
fn a_file_of_several_passes_runs_them_all() {
    let info = Info::read(fixture("steps-f32.onnx")).unwrap();
    assert_eq!((info.format, info.passes(), info.sigmas.as_slice()), (2, 3, &[8.0, 2.0, 0.5][..]));
    // onnxruntime 1.32.0 in a loop of numpy, with the noise of noise/ports/noise.py: the first six values of three passes
    // for labels [1, 0] of seed 2^33 + 5, and the sum of all |values|.
    //
    //     x = noise(purpose=0)
    //     for p, sigma in enumerate([8.0, 2.0, 0.5]):
    //         if p: x = noise(purpose=0x100 + p) + image / np.float32(sigma)
    //         image = session.run(None, {"noise": x, "row": [p * 2 + label for label in [1, 0]]})[0]
    let expected = [-0.54790473, -0.6076405, -0.49089473, -0.29027638, -0.40598375, -0.46325982];
    for engine in present() {
        let generator = load("steps-f32.onnx", engine);
        let seed = (1 << 33) + 5;
        let images = generator.generate(&request(seed, &[1, 0], 2)).unwrap();
        let values = images.as_f32().unwrap();
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-5, "{engine:?}: {value}, expected {expected}");
        }
        let sum: f64 = values.iter().map(|x| f64::from(x.abs())).sum();
        assert!((sum - 39.054_005).abs() < 1e-3, "{engine:?}: {sum}");

        // The batch of the file is 2: a chunk and a padded one, whose pictures keep their own noise in every pass.
        let more = generator.generate(&request(seed, &[1, 0, 1], 3)).unwrap();
        assert_eq!(more.as_f32().unwrap().slice(s![..2, .., .., ..]), values, "{engine:?}");
        let noise = picture_noise(seed, 0, 3, [1, 8, 6]);
        assert_eq!(generator.run_seeded(noise.view(), &[1, 0, 1], seed).unwrap(), more, "{engine:?}");
        assert_ne!(generator.run(noise.view(), &[1, 0, 1]).unwrap(), more, "{engine:?}: seed 0 between the passes");
    }
}

/// Both were written by the program when it wrote these formats, from models/tests/fixtures/edm-tiny in w8, the second as a
/// generator of three passes; the values are what it drew from them then.
#[test]
fn files_of_the_first_formats_make_the_pictures_that_they_made() {
    let first = Info::read(fixture("format-1.onnx")).unwrap();
    assert_eq!((first.format, first.batch, first.dynamic_batch, first.output), (1, 1, true, Output::U8));
    assert_eq!((first.fixed_class.as_deref(), first.precision.as_str(), first.passes()), (Some("1"), "w8", 1));
    let second = Info::read(fixture("format-2.onnx")).unwrap();
    assert_eq!((second.format, second.sigmas.as_slice()), (2, &[10.0, 2.5, 0.5][..]));
    assert_eq!(second.classes, ["0", "1", "2"]);
    for engine in present() {
        let make = |name| load(name, engine).generate(&request(7, &[], 3)).unwrap().to_f32();
        for (name, expected, expected_sum, tolerance) in [
            ("format-1.onnx", [0.137_254_95, 0.105_882_41, 0.168_627_5, -0.035_294_116], 100.282_366, 0.008),
            ("format-2.onnx", [0.071_102_306, -0.275_491_77, -0.133_424_76, 0.019_918_784], 144.272_213, 1e-4),
        ] {
            let values = make(name);
            for (value, expected) in values.iter().zip(expected) {
                assert!((value - expected).abs() <= tolerance, "{name}, {engine:?}: {value}, expected {expected}");
            }
            let sum: f64 = values.iter().map(|x| f64::from(x.abs())).sum();
            assert!((sum - expected_sum).abs() < 0.05, "{name}, {engine:?}: {sum}");
        }
    }
}

#[test]
fn a_description_is_written_as_it_is_read() {
    let described = Info {
        dialect: "portable".into(),
        sigmas: vec![8.0, 0.1],
        dynamic_batch: true,
        channels: 3,
        height: 8,
        width: 6,
        classes: vec!["a \"b\"".into(), "\u{1b}c".into()],
        weights_sha256: "0".into(),
        ..Info::default()
    };
    let metadata = described.to_metadata();
    let written = [
        r#""version":"0.1.0","dialect":"portable","precision":"fp32","sigmas":[8.0,0.1],"#,
        r#""inputs":[{"name":"noise","type":"f32","shape":[null,3,8,6]},{"name":"row","type":"i64","shape":[null]}],"#,
        r#""outputs":[{"name":"image","type":"f32","shape":[null,3,8,6]}],"#,
        r#""classes":["a \"b\"","\u001bc"],"weights_sha256":"0""#,
    ];
    assert_eq!(metadata, [("dmd.format", "3".into()), ("dmd", format!("{{{}}}", written.concat()))]);

    // Read from a whole file; the description is then what was written, and says what is in the file.
    let plain = |change: &dyn Fn(&mut Info)| {
        let mut info = Info { channels: 1, height: 4, width: 4, weights_sha256: "0".into(), ..Info::default() };
        change(&mut info);
        let metadata = info.to_metadata().into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        (info, Tiny { format: 3, metadata, ..Tiny::default() }.bytes())
    };
    let (written, bytes) = plain(&|info| info.sigmas = vec![4.0]);
    let read = Info::from_bytes(&bytes).unwrap();
    assert_eq!(read.file.nodes, 1);
    assert_eq!(Info { file: FileInfo::default(), ..read }, written);

    let refused = |change: &dyn Fn(&mut Info), expected: &str| {
        let reason = error(Info::from_bytes(&plain(change).1)).to_string();
        assert!(reason.contains(expected), "{reason}");
    };
    refused(&|info| info.sigmas = vec![], "the noise levels are [], expected");
    refused(&|info| info.sigmas = vec![1.0, 2.0], "expected positive ones, descending");
    refused(&|info| info.height = 5, "the metadata says f32 [1, 1, 5, 4]");
    refused(&|info| info.width = 0, "a length of 0");
    refused(&|info| info.classes = vec!["a".into()], "has no input \"label\" (i64 [1])");
    refused(&|info| info.output = Output::U8, "the metadata says u8 [1, 4, 4, 1]");
    for (json, expected) in [
        ("", "is no description"),
        ("{}", "missing field"),
        (r#"{"version":1}"#, "invalid type"),
        (
            &plain(&|_| {}).0.to_metadata()[1].1.replace("\"i64\"", "\"f32\"").replace("\"noise\"", "\"nose\""),
            "no noise",
        ),
        (&plain(&|_| {}).0.to_metadata()[1].1.replace("[1,1,4,4]", "[1,1,4,18446744073709551615]"), "values at once"),
    ] {
        let metadata = vec![("dmd.format".into(), "3".into()), ("dmd".into(), json.to_string())];
        let reason = error(Info::from_bytes(&Tiny { format: 3, metadata, ..Tiny::default() }.bytes())).to_string();
        assert!(reason.contains(expected), "{json}: {reason}");
    }
}

#[test]
fn engines_agree() {
    let engines = present();
    let make = |name, engine: &EngineChoice| load(name, *engine).generate(&request(3, &[], 5)).unwrap();
    for name in ["classes-f32.onnx", "plain-f32.onnx", "steps-f32.onnx"] {
        let images: Vec<_> = engines.iter().map(|engine| make(name, engine).to_f32()).collect();
        for pair in images.windows(2) {
            let difference = (&pair[0] - &pair[1]).mapv(f32::abs).fold(0.0, |a: f32, b| a.max(*b));
            assert!(difference < 1e-5, "{name}: {difference}");
        }
    }
}

/// By names, in any order, whatever the file is: here a generator, whose own call gives the same.
#[test]
fn a_file_runs_on_feeds_by_name_and_refuses_others() {
    let noise = ramp(2);
    let values = noise.as_slice().unwrap();
    for engine in present() {
        let module = Module::load(fixture("classes-f32.onnx"), Options { engine, ..Options::default() }).unwrap();
        let label = Feed { name: "label", shape: &[2], values: Values::I64(&[2, 0]) };
        let noise_feed = Feed { name: "noise", shape: &[2, 3, 8, 6], values: Values::F32(values) };
        let expected = load("classes-f32.onnx", engine).run(noise.view(), &[2, 0]).unwrap();
        let expected = expected.as_f32().unwrap().iter().copied().collect();
        assert_eq!(module.run(&[label, noise_feed]).unwrap(), [Given::F32(expected)], "{engine:?}");
        let refused = |feeds: &[Feed], part: &str| {
            let reason = error(module.run(feeds)).to_string();
            assert!(reason.contains(part), "{reason}");
        };
        refused(&[label], "nothing is given for \"noise\", f32 [2, 3, 8, 6]");
        refused(&[noise_feed, label, label], "3 feeds");
        let ids = Feed { name: "label", shape: &[2], values: Values::I32(&[2, 0]) };
        refused(&[noise_feed, ids], "\"label\" is given 2 values of i32 in shape [2], expected i64 [2]");
        let short = Feed { name: "noise", shape: &[1, 3, 8, 6], values: Values::F32(&values[..144]) };
        refused(&[noise_feed, Feed { shape: &[1], ..label }], "expected i64 [2]");
        refused(&[short, label], "in shape [1, 3, 8, 6], expected f32 [2, 3, 8, 6]");
    }
}

#[test]
fn a_u8_file_gives_the_rounded_values_of_its_f32_twin() {
    for engine in present() {
        let make = |name| load(name, engine).generate(&request(11, &[], 6)).unwrap();
        let (floats, bytes) = (make("classes-f32.onnx"), make("classes-u8.onnx"));
        assert_eq!(bytes.output(), Output::U8);
        assert_eq!(floats.to_u8(), bytes.to_u8(), "{engine:?}");
        assert_eq!(floats.to_u8()[[0, 1, 2, 0]], quantize(floats.to_f32()[[0, 0, 1, 2]]));
        let distance = (floats.to_f32() - bytes.to_f32()).mapv(f32::abs).fold(0.0, |a: f32, b| a.max(*b));
        assert!(distance <= 1.0 / 255.0 + 1e-6, "{engine:?}: {distance}");
    }
}

#[test]
fn a_picture_is_the_same_in_any_batch() {
    for engine in present() {
        let generator = load("classes-f32.onnx", engine);
        // The file's own batch is 2: chunks of 2, 2 and a padded 1.
        let all = generator.generate(&request(5, &[], 5)).unwrap();
        assert_eq!(all.labels(), [0, 1, 2, 0, 1]);
        for n in 1..5 {
            let some = generator.generate(&request(5, &[], n)).unwrap();
            assert_eq!(some.as_f32().unwrap(), all.as_f32().unwrap().slice(s![..n, .., .., ..]), "{engine:?}: {n}");
        }
        let noise = picture_noise(5, 4, 1, [3, 8, 6]);
        let last = generator.run(noise.view(), &[1]).unwrap();
        assert_eq!(last.as_f32().unwrap(), all.as_f32().unwrap().slice(s![4.., .., .., ..]), "{engine:?}");
    }
}

#[test]
fn noise_of_any_memory_order_gives_the_same_pictures() {
    for engine in present() {
        let generator = load("classes-f32.onnx", engine);
        let noise = ramp(3);
        let channels_last = noise.view().permuted_axes([0, 2, 3, 1]).as_standard_layout().into_owned();
        let run = |noise| generator.run(noise, &[2, 1, 0]).unwrap();
        assert_eq!(run(noise.view()), run(channels_last.view().permuted_axes([0, 3, 1, 2])));
    }
}

#[test]
fn labels_choose_the_pictures() {
    for engine in present() {
        let generator = load("classes-f32.onnx", engine);
        let make = |labels: &[usize]| generator.generate(&request(1, labels, 3)).unwrap();
        assert_eq!(make(&[1]).labels(), [1, 1, 1]);
        assert_eq!(make(&[2, 0, 1]).labels(), [2, 0, 1]);
        assert_eq!(make(&[]), make(&[0, 1, 2]));
        let first = |images: Images| images.as_f32().unwrap().index_axis(ndarray::Axis(0), 0).to_owned();
        assert_ne!(first(make(&[0])), first(make(&[1])));
    }
}

#[test]
fn pictures_have_the_files_size_and_colours() {
    for engine in present() {
        let colour = load("classes-u8.onnx", engine).generate(&request(0, &[], 2)).unwrap().to_images();
        assert_eq!((colour.len(), colour[0].width(), colour[0].height()), (2, 6, 8));
        assert_eq!(colour[0].color(), image::ColorType::Rgb8);
        let grey = load("plain-f32.onnx", engine).generate(&Request::default()).unwrap();
        assert!(grey.labels().is_empty());
        assert_eq!(grey.to_images()[0].color(), image::ColorType::L8);
    }
}

#[test]
fn wrong_requests_are_named() {
    for engine in present() {
        let generator = load("classes-f32.onnx", engine);
        let make = |labels: &[usize], batch| error(generator.generate(&request(0, labels, batch)));
        assert!(matches!(make(&[], 0), Error::EmptyBatch));
        assert!(matches!(make(&[3], 2), Error::Label { label: 3, classes: 3 }));
        assert!(matches!(make(&[usize::MAX], 2), Error::Label { .. }));
        assert!(matches!(make(&[0, 1], 3), Error::LabelCount { found: 2, .. }));
        for batch in [usize::MAX, usize::MAX / 144, 1 << 30] {
            assert!(matches!(make(&[], batch), Error::TooLarge { .. }), "{batch}");
        }
        let run = |noise: Array4<f32>, labels: &[i64]| error(generator.run(noise.view(), labels));
        assert!(matches!(run(ramp(2), &[0, -1]), Error::Label { label: -1, .. }));
        assert!(matches!(run(ramp(2), &[0]), Error::LabelCount { found: 1, .. }));
        assert!(matches!(run(ramp(0), &[]), Error::EmptyBatch));
        let wrong = run(Array4::zeros((1, 3, 6, 8)), &[0]);
        assert_eq!(wrong.to_string(), "noise has shape [1, 3, 6, 8], expected [N, 3, 8, 6]");

        let plain = load("plain-f32.onnx", engine);
        assert!(matches!(error(plain.generate(&request(0, &[0], 1))), Error::NotLabelled));
        assert!(matches!(error(plain.run(Array4::zeros((1, 1, 8, 6)).view(), &[0])), Error::NotLabelled));
    }
}

#[test]
fn values_that_are_not_finite_are_an_error() {
    // The bias of the last convolution becomes NaN.
    let mut bytes = fs::read(fixture("plain-f32.onnx")).unwrap();
    let bias = b"image.b\x4a\x04";
    let at = bytes.windows(bias.len()).position(|window| window == bias).unwrap() + bias.len();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nan.onnx");
    fs::write(&path, bytes).unwrap();
    for engine in present() {
        let broken = Generator::load(&path, Options { engine, ..Options::default() }).unwrap();
        let found = error(broken.generate(&Request::default()));
        assert!(matches!(found, Error::NotFinite { picture: 0 }), "{engine:?}: {found}");

        let mut noise = ramp(3);
        noise[[2, 1, 4, 4]] = f32::NAN;
        let found = error(load("classes-f32.onnx", engine).run(noise.view(), &[0, 0, 0]));
        assert!(matches!(found, Error::NoiseNotFinite { picture: 2 }), "{engine:?}: {found}");
    }
}

/// Writes a changed copy of a fixture; `from` and `to` are of the same length, so that the file stays whole.
fn changed(name: &str, from: &str, to: &str) -> (tempfile::TempDir, PathBuf) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(fixture(name)).unwrap();
    let at = bytes.windows(from.len()).rposition(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.onnx");
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

#[test]
fn files_that_are_not_ours_are_refused_with_what_they_are() {
    let foreign = error(Info::read(fixture("foreign.onnx"))).to_string();
    for part in ["foreign.onnx: not one of ours", "\"fixture\"", "noise: f32 [1, 1, 8, 6]", "dmd.sigma"] {
        assert!(foreign.contains(part), "{foreign}");
    }
    assert!(matches!(error(Info::read(fixture("none.onnx"))), Error::Io { .. }));
    assert!(matches!(error(Info::read(fixture(""))), Error::Io { .. }));
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in
        [("empty", &b""[..]), ("text", b"this is no model"), ("png", b"\x89PNG\r\n\x1a\n"), ("zip", b"PK\x03\x04")]
    {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let found = error(Generator::load(&path, Options::default()));
        assert!(matches!(found, Error::NotOnnx { .. }), "{name}: {found}");
    }
}

#[test]
fn broken_metadata_is_named() {
    let check_in = |name: &str, from: &str, to: &str, expected: &str| {
        let (_folder, path) = changed(name, from, to);
        let found = error(Generator::load(&path, Options::default()));
        assert!(matches!(found, Error::Inconsistent { .. }), "{found}");
        assert!(found.to_string().contains(expected), "{found}");
    };
    let check = |from: &str, to: &str, expected: &str| check_in("classes-f32.onnx", from, to, expected);
    check("dmd.sigma", "dmd.xxxxx", "the metadata has no dmd.sigma");
    check("2.5", "two", "dmd.sigma is \"two\", expected a number");
    check("2.5", "inf", "the noise levels are [inf], expected positive ones");
    check("2.5", "NaN", "the noise levels are [NaN]");
    check("dmd.dialect", "dmd.version", "the metadata has dmd.version twice");
    check("\"star\"]", "\"star\")", "expected a JSON array of names");
    check("dmd.output\x12\x03f32", "dmd.output\x12\x03i32", "dmd.output is \"i32\"");
    check("dmd.batch\x12\x012", "dmd.batch\x12\x010", "dmd.batch is 0");
    check(
        "dmd.batch\x12\x012",
        "dmd.batch\x12\x013",
        "input \"noise\" of the graph is f32 [2, 3, 8, 6], the metadata says f32 [3, 3, 8, 6]",
    );
    check("dmd.width\x12\x016", "dmd.width\x12\x017", "the metadata says f32 [2, 3, 8, 7]");
    let names = r#"["circle", "square", "star"]"#;
    check(names, &format!("[{}]", " ".repeat(names.len() - 2)), "expected only [\"noise\"]");

    let check = |from: &str, to: &str, expected: &str| check_in("steps-f32.onnx", from, to, expected);
    let list = "[8.0, 2.0, 0.5]";
    check(list, "[8.0, 2.0, 8.5]", "the noise levels are [8.0, 2.0, 8.5], expected positive ones, descending");
    check(list, "[9.0, 2.0, 0.5]", "descending from dmd.sigma, 8");
    check(list, "[8.0, 2.0,-0.5]", "expected positive ones, descending");
    check(list, "[8.0          ]", "expected two noise levels or more");
    check(list, "8.0 and 2.0 ...", "expected a JSON array of noise levels");
    // One level less than the graph has rows for; without the list, the graph is another one than promised.
    check(list, "[8.0, 2.0     ]", "pass_table has 6 rows, 2 noise levels and 2 classes ask for 4");
    check("dmd.steps", "dmd.xxxxx", "pass_table has 6 rows");
    check("row", "raw", "the graph has no input \"row\" (i64 [2])");
}

#[test]
fn a_newer_format_is_refused_as_such() {
    let (_folder, path) = changed("classes-f32.onnx", "dmd.format\x12\x011", "dmd.format\x12\x014");
    assert!(matches!(error(Info::read(path)), Error::NewerFormat { found: 4, .. }));
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let bytes = fs::read(fixture("classes-f32.onnx")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.onnx");
    for n in 0..bytes.len() {
        fs::write(&path, &bytes[..n]).unwrap();
        assert!(Generator::load(&path, Options::default()).is_err(), "cut at {n}");
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let bytes = fs::read(fixture("classes-f32.onnx")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flipped.onnx");
    // What tract throws on a broken graph is caught; its messages would drown the test's.
    let (hook, here) = (std::panic::take_hook(), std::thread::current().id());
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().id() != here {
            hook(panic);
        }
    }));
    for engine in present() {
        for at in (0..bytes.len()).step_by(3) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            fs::write(&path, bytes).unwrap();
            // A flip in a weight, or in a name, may leave a good file.
            if let Ok(generator) = Generator::load(&path, Options { engine, ..Options::default() }) {
                drop(generator.generate(&request(0, &[], 2)));
            }
        }
    }
}

#[test]
fn a_named_library_that_is_missing_is_an_error_with_its_place() {
    if !cfg!(feature = "onnxruntime") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let false_library = folder.path().join("libonnxruntime.so");
    for engine in [EngineChoice::OnnxRuntime, EngineChoice::Auto] {
        let load = |library: &Path| {
            let options = Options { engine, library: Some(library.into()), ..Options::default() };
            error(Generator::load(fixture("classes-f32.onnx"), options))
        };
        let missing = load(&folder.path().join("none"));
        assert!(matches!(missing, Error::NoLibrary { .. }), "{missing}");
        assert!(missing.to_string().contains("does not exist"), "{missing}");
        fs::write(&false_library, "no library").unwrap();
        // Where the process has a library already, another one is refused before it is opened.
        let found = load(&false_library);
        assert!(matches!(found, Error::NoLibrary { .. } | Error::OtherLibraryLoaded { .. }), "{found}");
        assert!(found.to_string().contains("libonnxruntime.so"), "{found}");
    }
}
