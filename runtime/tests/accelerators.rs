//! Accelerators that are not there, and plug-ins that are none: pictures come from the processor, and the placement says why.
//! Those that are there are tested by `cargo xtask edge-test`, each in a process of its own.

use std::fs;
use std::path::{Path, PathBuf};

use dmd_runtime::{
    Accelerator, CoreMl, EngineChoice, EngineKind, Error, Generator, Options, PlugIn, Qnn, Request, Step,
};
use dmd_runtime::{PassedOver, engines};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/classes-f32.onnx")
}

fn options(accelerators: &[Accelerator]) -> Options {
    Options { accelerators: accelerators.to_vec(), threads: Some(1), ..Options::default() }
}

/// ONNX Runtime's library of this machine, where it has one.
fn library() -> Option<PathBuf> {
    let found = engines(None).into_iter().find(|engine| engine.kind == EngineKind::OnnxRuntime)?;
    if let Some(reason) = &found.reason {
        eprintln!("skipped: {reason}");
    }
    found.library
}

/// Why each was passed over, after a check that the pictures are the processor's.
fn passed_over(accelerators: &[Accelerator]) -> Vec<PassedOver> {
    let generator = Generator::load(fixture(), options(accelerators)).unwrap();
    let expected = Generator::load(fixture(), options(&[])).unwrap();
    let request = Request { seed: 1, batch: 3, ..Request::default() };
    assert_eq!(generator.generate(&request).unwrap(), expected.generate(&request).unwrap());
    let placement = generator.placement();
    assert_eq!((placement.accelerator.as_str(), placement.probe, placement.nodes.len()), ("CPU", None, 0));
    let (line, names) = (placement.to_string(), accelerators.iter().map(Accelerator::to_string));
    assert!(names.clone().all(|name| line.contains(&name)) && !line.contains('\n'), "{line}");
    assert!(placement.passed_over.iter().map(|passed| passed.accelerator.clone()).eq(names));
    placement.passed_over
}

#[test]
fn an_accelerator_is_read_from_the_words_of_a_command_line() {
    let qnn = "qnn=/opt/qnn.so,soc_model=57,backend_type=gpu,profiling_level=off".parse::<Accelerator>().unwrap();
    let expected = Qnn {
        backend: "gpu".into(),
        soc_model: Some(57),
        options: vec![("profiling_level".into(), "off".into())],
        ..Qnn::new("/opt/qnn.so")
    };
    assert_eq!(qnn, Accelerator::Qnn(expected));
    assert_eq!("cuda:1".parse::<Accelerator>().unwrap(), Accelerator::Cuda { device: 1 });
    let names = ["cpu", "openvino", "openvino:NPU", "openvino=/a.so", "coreml", "tensorrt:2", "custom=/b.so"];
    let names = names.map(|words| words.parse::<Accelerator>().unwrap().to_string());
    let expected =
        ["CPU", "OpenVINO (CPU)", "OpenVINO (NPU)", "OpenVINO (plug-in)", "Core ML", "TensorRT (2)", "Custom"];
    assert_eq!(names, expected);
    for (words, expected) in [
        ("warp", "accelerator \"warp\": expected cpu, openvino[:DEVICE], "),
        ("cuda:first", "\"first\" is no number of a device"),
        ("coreml:1", "coreml has no devices"),
        ("webgpu", "is a plug-in, expected webgpu=LIBRARY"),
        ("tpu=/a.so", "\"tpu\" is no plug-in"),
        ("qnn=/a.so,soc_model=SM8650", "soc_model \"SM8650\" is no number"),
        ("webgpu=/a.so,fast", "\"fast\" is no option, expected NAME=VALUE"),
    ] {
        let error = words.parse::<Accelerator>().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// What only Apple's and Android's builds have; no build for Linux has them.
#[cfg(target_os = "linux")]
#[test]
fn an_accelerator_that_the_library_lacks_is_passed_over_with_where_to_get_it() {
    if library().is_none() {
        return;
    }
    let found = passed_over(&[Accelerator::CoreMl(CoreMl::default()), Accelerator::Nnapi { fp16: true }]);
    for (passed, remedy) in found.iter().zip(["for macOS or iOS", "for Android"]) {
        assert_eq!(passed.step, Step::Registered);
        assert!(passed.reason.contains("is built without it: ") && passed.reason.ends_with(remedy), "{passed:?}");
    }
}

#[test]
fn a_plug_in_that_is_none_is_passed_over_with_what_it_is() {
    let Some(library) = library().filter(|library| library.is_file()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(&library).unwrap();
    let written = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let (text, cut) = (written("text.so", b"no library"), written("cut.so", &bytes[..bytes.len() / 2]));
    let custom = |path: &Path| {
        let plug_in = PlugIn { options: vec![("a".into(), "b".into())], ..PlugIn::new(path) };
        Accelerator::Custom { name: "Mine".into(), plug_in, fp16: false }
    };
    let found = passed_over(&[
        Accelerator::WebGpu(PlugIn::new("libonnxruntime_providers_webgpu.so")),
        Accelerator::Qnn(Qnn::new(folder.path().join("none.so"))),
        Accelerator::OpenVinoPlugIn(PlugIn::new(&text)),
        custom(&cut),
        // A library, but not of a plug-in: told in the same words when it is asked for again.
        custom(&library),
        custom(&library),
    ]);
    let expected = [
        "libonnxruntime_providers_webgpu.so: is a relative path",
        "none.so: ",
        "text.so: is no library",
        "cut.so: is",
        "CreateEpFactories",
        "CreateEpFactories",
    ];
    for (passed, expected) in found.iter().zip(expected) {
        assert_eq!(passed.step, Step::Registered, "{passed:?}");
        assert!(passed.reason.contains(expected), "{passed:?}");
    }
}

#[test]
fn what_is_required_and_not_there_is_an_error_that_lists_the_reasons() {
    let accelerators = [Accelerator::WebGpu(PlugIn::new("here.so")), Accelerator::Nnapi { fp16: false }];
    for engine in [EngineChoice::Auto, EngineChoice::Tract] {
        let load = |require_accelerator| {
            Generator::load(fixture(), Options { engine, require_accelerator, ..options(&accelerators) })
        };
        let error = load(true).unwrap_err();
        assert!(matches!(&error, Error::NoAccelerator { passed_over } if passed_over.len() == 2), "{error}");
        assert!(error.to_string().contains("\n  WebGPU: not there: "), "{error}");
        assert_eq!(load(false).unwrap().placement().passed_over.len(), 2);
        let error =
            Generator::load(fixture(), Options { engine, require_accelerator: true, ..options(&[]) }).unwrap_err();
        assert!(matches!(error, Error::NoAccelerator { .. }), "{error}");
    }
    let tract = Generator::load(fixture(), Options { engine: EngineChoice::Tract, ..options(&accelerators) }).unwrap();
    assert!(
        tract.placement().to_string().starts_with("tract; passed over: WebGPU (not there: tract runs on the processor")
    );
}

/// An app that asks for nothing special pays nothing: no second load, no run.
#[test]
fn without_a_list_the_processor_runs_all() {
    for engine in engines(None).into_iter().filter(|engine| engine.is_present()) {
        let (choice, name) = match engine.kind {
            EngineKind::Tract => (EngineChoice::Tract, "tract"),
            EngineKind::OnnxRuntime => (EngineChoice::OnnxRuntime, "CPU"),
        };
        for accelerators in [&[][..], &[Accelerator::Cpu, Accelerator::Nnapi { fp16: false }]] {
            let generator = Generator::load(fixture(), Options { engine: choice, ..options(accelerators) }).unwrap();
            let placement = generator.placement();
            assert_eq!(placement.to_string(), name);
            assert_eq!((placement.taken(), placement.probe), ((0, 0), None));
        }
    }
}
