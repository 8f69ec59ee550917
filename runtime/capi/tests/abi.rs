//! The ABI's functions as they are, called from Rust: the same pictures as the crate's, on many threads, and called off.

#![cfg(feature = "tract")]

use std::ffi::{CStr, CString, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

use dmd_capi::*;
use dmd_runtime as runtime;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

const TRACT: Options = Options {
    size: size_of::<Options>(),
    threads: 0,
    library: null(),
    engine: Engine::Tract as u32,
    require_accelerator: 0,
    accelerators: null(),
    low_memory: 0,
};

fn open(name: &str) -> Generator {
    let (path, mut generator) = (CString::new(fixture(name).to_str().unwrap()).unwrap(), 0);
    check(unsafe { dmd_open(path.as_ptr(), &TRACT, &mut generator) });
    generator
}

fn check(status: Status) {
    assert_eq!(status, Status::Ok, "{}", last_error());
}

fn last_error() -> String {
    unsafe { CStr::from_ptr(dmd_last_error()) }.to_str().unwrap().into()
}

fn request(seed: u64, batch: usize, labels: &[i64]) -> Request {
    Request { size: size_of::<Request>(), seed, batch, labels: labels.as_ptr(), n_labels: labels.len(), watch: 0 }
}

fn f32s(generator: Generator, request: &Request, n: usize) -> Vec<f32> {
    let mut values = vec![0.0; n];
    check(unsafe { dmd_generate_f32(generator, request, values.as_mut_ptr(), n) });
    values
}

#[test]
fn pictures_are_those_of_the_crate_in_every_layout() {
    for (name, [channels, height, width]) in [("classes-f32.onnx", [3, 8, 6]), ("classes-u8.onnx", [3, 8, 6])] {
        let generator = open(name);
        let options = runtime::Options { engine: runtime::EngineChoice::Tract, ..Default::default() };
        let crate_generator = runtime::Generator::load(fixture(name), options).unwrap();
        for labels in [&[][..], &[2], &[1, 0, 2, 1, 1]] {
            let request = request(9, 5, labels);
            let labels = labels.iter().map(|label| (*label as usize).into()).collect();
            let asked = runtime::Request { seed: 9, batch: 5, labels, ..Default::default() };
            let expected = crate_generator.generate(&asked).unwrap();
            let n = 5 * channels * height * width;
            assert_eq!(f32s(generator, &request, n), expected.to_f32().as_slice().unwrap(), "{name}");
            let mut pixels = vec![0; n];
            check(unsafe { dmd_generate_u8(generator, &request, pixels.as_mut_ptr(), n) });
            assert_eq!(pixels, expected.to_u8().as_slice().unwrap(), "{name}");
            let mut rgba = vec![0; 5 * height * width * 4];
            check(unsafe { dmd_generate_rgba(generator, &request, rgba.as_mut_ptr(), rgba.len()) });
            let of_each: Vec<u8> = expected.iter().flat_map(|image| image.to_rgba().unwrap()).collect();
            assert_eq!(rgba, of_each, "{name}");
        }
        check(dmd_close(generator));
    }
}

#[test]
fn a_model_in_memory_makes_the_pictures_of_its_file_and_a_cut_one_is_an_error() {
    let (from_path, mut from_bytes) = (open("plain-f32.onnx"), 0);
    let bytes = std::fs::read(fixture("plain-f32.onnx")).unwrap();
    check(unsafe { dmd_open_bytes(bytes.as_ptr(), bytes.len(), &TRACT, &mut from_bytes) });
    let one = request(3, 1, &[]);
    assert_eq!(f32s(from_bytes, &one, 48), f32s(from_path, &one, 48));
    for n in (0..bytes.len()).step_by(7) {
        let mut cut = 1;
        let status = unsafe { dmd_open_bytes(bytes.as_ptr(), n, &TRACT, &mut cut) };
        assert_eq!((status, cut), (Status::BadFile, 0), "{n} bytes: {}", last_error());
    }
}

fn described(generator: Generator) -> serde_json::Value {
    let mut needed = 0;
    check(unsafe { dmd_describe_json(generator, null_mut(), 0, &mut needed) });
    let mut json = vec![0u8; needed];
    check(unsafe { dmd_describe_json(generator, json.as_mut_ptr().cast(), needed, null_mut()) });
    serde_json::from_slice(&json[..needed - 1]).unwrap()
}

/// None of these is in any library for Linux's processors, nor in tract: another runs the file, and the reasons are told.
#[test]
fn accelerators_that_are_not_here_are_passed_over_with_a_reason_or_required_in_vain() {
    let path = CString::new(fixture("plain-f32.onnx").to_str().unwrap()).unwrap();
    let list = r#"[{"direct_ml": {"device": 0}}, {"core_ml": {"units": "gpu", "cache": "/cache"}},
        {"web_gpu": {"library": "/nowhere/plug_in.so", "options": [["a", "b"]]}}, {"qnn": {"library": "/nowhere/qnn.so"}}]"#;
    let list = CString::new(list).unwrap();
    let mut generator = 0;
    let options = Options { engine: Engine::Auto as u32, accelerators: list.as_ptr(), ..TRACT };
    check(unsafe { dmd_open(path.as_ptr(), &options, &mut generator) });
    let placement = &described(generator)["placement"];
    let passed_over = placement["passed_over"].as_array().unwrap();
    assert_eq!(passed_over.len(), 4, "{placement}");
    assert!(passed_over.iter().all(|one| !one["reason"].as_str().unwrap().is_empty()), "{placement}");

    // The list of the page, whatever of it is here.
    let page = include_str!("../../../docs/runtime.md").split_once("```json\n").unwrap().1.split_once("```").unwrap().0;
    let page = CString::new(page).unwrap();
    check(unsafe { dmd_open(path.as_ptr(), &Options { accelerators: page.as_ptr(), ..options }, &mut generator) });

    let required = Options { require_accelerator: 1, ..options };
    assert_eq!(unsafe { dmd_open(path.as_ptr(), &required, &mut generator) }, Status::NoEngine);
    println!("{}", last_error());
}

#[test]
fn zero_threads_are_all_of_them() {
    let (path, mut generator) = (CString::new(fixture("plain-f32.onnx").to_str().unwrap()).unwrap(), 0);
    check(unsafe { dmd_open(path.as_ptr(), null(), &mut generator) });
    let json = described(generator);
    assert_eq!((json["file"]["height"].as_u64(), json["file"]["width"].as_u64()), (Some(8), Some(6)));
    assert!(json["engine"]["kind"].is_string(), "{json}");
}

#[test]
fn classes_are_found_by_name_and_number() {
    let generator = open("classes-f32.onnx");
    let mut info =
        Info { size: size_of::<Info>(), channels: 0, height: 0, width: 0, batch: 0, n_classes: 0, n_passes: 0 };
    check(unsafe { dmd_describe(generator, &mut info) });
    assert_eq!((info.channels, info.height, info.width, info.batch, info.n_classes, info.n_passes), (3, 8, 6, 2, 3, 1));
    for class in 0..3 {
        let (mut name, mut found) = ([0u8; 64], -1);
        check(unsafe { dmd_class_name(generator, class, name.as_mut_ptr().cast(), 64, null_mut()) });
        check(unsafe { dmd_find_class(generator, name.as_ptr().cast(), &mut found) });
        assert_eq!(found, class);
        let number = CString::new(class.to_string()).unwrap();
        check(unsafe { dmd_find_class(generator, number.as_ptr(), &mut found) });
        assert_eq!(found, class);
    }
}

#[test]
fn own_noise_makes_the_picture_of_its_seed() {
    let generator = open("steps-f32.onnx");
    let mut noise = [0.0; 48];
    check(unsafe { dmd_noise(7, NOISE_PICTURE, 0, noise.as_mut_ptr(), 48) });
    assert_eq!(noise[..], runtime::noise::Stream::new(7, 0, 0).normal(48));
    let mut values = [0.0; 48];
    check(unsafe { dmd_run(generator, noise.as_ptr(), [1].as_ptr(), 1, 7, values.as_mut_ptr(), 48) });
    assert_eq!(values[..], f32s(generator, &request(7, 1, &[1]), 48));
}

#[test]
fn many_threads_share_a_generator_that_one_of_them_closes() {
    let generator = open("classes-f32.onnx");
    let expected = f32s(generator, &request(1, 4, &[]), 4 * 144);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let (request, mut values) = (request(1, 4, &[]), vec![0.0; 4 * 144]);
                    match unsafe { dmd_generate_f32(generator, &request, values.as_mut_ptr(), values.len()) } {
                        Status::Ok => assert_eq!(values, expected),
                        status => {
                            assert_eq!(status, Status::BadHandle, "{}", last_error());
                            break;
                        }
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while done.load(Ordering::Relaxed) < 40 {
            std::thread::yield_now();
        }
        check(dmd_close(generator));
    });
}

#[test]
fn a_watch_hears_each_pass_and_calls_a_request_off() {
    struct Seen {
        watch: Watch,
        cancel_at: usize,
        heard: Vec<(usize, usize)>,
    }
    extern "C" fn hear(context: *mut c_void, done: usize, total: usize) {
        // SAFETY: the test's own, which waits for the request.
        let seen = unsafe { &mut *context.cast::<Seen>() };
        seen.heard.push((done, total));
        if done >= seen.cancel_at {
            check(dmd_cancel(seen.watch));
        }
    }
    let generator = open("steps-f32.onnx");
    for (cancel_at, status, heard) in [
        (usize::MAX, Status::Ok, &[(0, 9), (2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)][..]),
        (4, Status::Cancelled, &[(0, 9), (2, 9), (4, 9)]),
        (0, Status::Cancelled, &[(0, 9)]),
    ] {
        let mut seen = Seen { watch: 0, cancel_at, heard: vec![] };
        let context: *mut Seen = &mut seen;
        // SAFETY: `seen` outlives the watch and the request.
        unsafe {
            check(dmd_open_watch(Some(hear), context.cast(), &raw mut (*context).watch));
            let watched = Request { watch: (*context).watch, ..request(0, 3, &[]) };
            let mut values = [0.0; 3 * 48];
            assert_eq!(dmd_generate_f32(generator, &watched, values.as_mut_ptr(), 3 * 48), status);
            check(dmd_close_watch((*context).watch));
            assert_eq!((*context).heard, heard);
        }
    }
}

#[test]
fn a_png_holds_the_pixels_that_it_is_given() {
    for channels in 1..=4u32 {
        let pixels: Vec<u8> = (0..5 * 7 * channels).map(|i| (i * 37) as u8).collect();
        let (mut png, mut needed) = (vec![0; 4096], 0);
        check(unsafe { dmd_png(pixels.as_ptr(), 5, 7, channels, png.as_mut_ptr(), png.len(), &mut needed) });
        let read = image::load_from_memory(&png[..needed]).unwrap();
        assert_eq!((read.width(), read.height(), read.color().channel_count()), (7, 5, channels as u8));
        assert_eq!(read.as_bytes(), pixels);
    }
}
