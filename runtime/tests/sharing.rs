//! One generator for a whole app: many threads, the caller's memory, requests that are watched and called off.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use dmd_runtime::{Buffer, EngineChoice, EngineKind, Error, Generator, Info, Options, Output, Progress};
use dmd_runtime::{Request, Watch, engines, quantize};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn present() -> Vec<EngineChoice> {
    let present = engines(None).into_iter().filter(|engine| engine.is_present());
    let choice = |kind| if kind == EngineKind::Tract { EngineChoice::Tract } else { EngineChoice::OnnxRuntime };
    present.map(|engine| choice(engine.kind)).collect()
}

fn load(name: &str, engine: EngineChoice) -> Generator {
    Generator::load(fixture(name), Options { engine, threads: Some(1), ..Options::default() }).unwrap()
}

fn request(seed: u64, batch: usize) -> Request {
    Request { seed, batch, ..Request::default() }
}

#[test]
fn a_generator_goes_to_any_thread_and_serves_several() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Generator>();
    is_shared::<Watch>();
    const THREADS: u64 = 8;
    for engine in present() {
        for name in ["classes-f32.onnx", "classes-u8.onnx", "steps-f32.onnx", "format-1.onnx"] {
            let generator = load(name, engine);
            let batch = |seed: u64| 1 + seed as usize % 5;
            let make = |seed| generator.generate(&request(seed, batch(seed))).unwrap();
            let alone: Vec<_> = (0..40).map(make).collect();
            thread::scope(|scope| {
                for worker in 0..THREADS {
                    let (alone, make) = (&alone, &make);
                    scope.spawn(move || {
                        for turn in 0..40 {
                            let seed = (turn * (2 * worker + 1) + worker) % 40;
                            assert_eq!(make(seed), alone[seed as usize], "{name}, {engine:?}, seed {seed}");
                        }
                    });
                }
            });
        }
    }
}

#[test]
fn pictures_go_into_the_callers_memory_in_the_layout_that_is_asked_for() {
    for engine in present() {
        for (name, n) in [("classes-f32.onnx", 5), ("classes-u8.onnx", 5), ("plain-f32.onnx", 2), ("format-1.onnx", 3)]
        {
            let generator = load(name, engine);
            let [channels, height, width] = generator.info().shape();
            let images = generator.generate(&request(3, n)).unwrap();
            let (floats, bytes) = (images.to_f32(), images.to_u8());

            let mut values = vec![9.0; n * channels * height * width];
            generator.generate_into(&request(3, n), Buffer::F32(&mut values)).unwrap();
            assert_eq!(values, floats.as_slice().unwrap(), "{name}, {engine:?}");
            let mut pixels = vec![9; n * channels * height * width];
            generator.generate_into(&request(3, n), Buffer::U8(&mut pixels)).unwrap();
            assert_eq!(pixels, bytes.as_slice().unwrap(), "{name}, {engine:?}");
            if generator.info().output == Output::F32 {
                assert_eq!(pixels[1], quantize(floats[[0, 1 % channels, 0, 1 / channels]]));
            }
            let mut rgba = vec![9; n * 4 * height * width];
            generator.generate_into(&request(3, n), Buffer::Rgba(&mut rgba)).unwrap();
            for (i, image) in images.iter().enumerate() {
                let part = &rgba[i * 4 * height * width..][..4 * height * width];
                assert_eq!(part, image.to_rgba().unwrap(), "{name}, {engine:?}, picture {i}");
                assert_eq!(part, image.to_image().to_rgba8().into_raw(), "{name}, {engine:?}, picture {i}");
            }

            for wrong in [0, values.len() - 1, values.len() + 1] {
                let error = generator.generate_into(&request(3, n), Buffer::F32(&mut vec![0.0; wrong])).unwrap_err();
                assert!(matches!(error, Error::BufferSize { found, .. } if found == wrong), "{error}");
                assert!(error.to_string().contains(&format!("the pictures are {}", values.len())), "{error}");
            }
        }
    }
}

#[test]
fn a_class_goes_by_its_name_or_its_number() {
    for engine in present() {
        let generator = load("classes-f32.onnx", engine);
        let make = |labels| generator.generate(&Request { labels, batch: 2, ..Request::default() });
        let star = make(vec![2.into()]).unwrap();
        assert_eq!(star.labels(), [2, 2]);
        assert_eq!(make(vec!["star".into()]).unwrap(), star);
        assert_eq!(make(vec!["2".into()]).unwrap(), star);
        assert_eq!(make(vec!["star".into(), 0.into()]).unwrap().labels(), [2, 0]);
        let error = make(vec!["starr".into()]).unwrap_err().to_string();
        assert_eq!(error, "no class of this file is named \"starr\"; it has circle, square, star");
        assert!(matches!(make(vec![3.into()]), Err(Error::Label { label: 3, classes: 3 })));
        assert!(matches!(make(vec![usize::MAX.into()]), Err(Error::Label { .. })));
        let plain = load("plain-f32.onnx", engine);
        let error = plain.generate(&Request { labels: vec!["star".into()], ..Request::default() }).unwrap_err();
        assert!(matches!(error, Error::NotLabelled), "{error}");
    }
}

#[test]
fn a_watch_hears_every_pass_and_calls_the_pictures_off() {
    for engine in present() {
        // Three passes, two pictures in a call: five pictures are three calls.
        let generator = load("steps-f32.onnx", engine);
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hear = heard.clone();
        let watch = Watch::on_progress(move |progress| hear.lock().unwrap().push(progress));
        let watched = |watch: &Watch| Request { watch: Some(watch.clone()), ..request(1, 5) };
        let images = generator.generate(&watched(&watch)).unwrap();
        assert_eq!(images, generator.generate(&request(1, 5)).unwrap());
        let done = [0, 2, 4, 6, 8, 10, 12, 13, 14, 15];
        assert_eq!(*heard.lock().unwrap(), done.map(|done| Progress { done, total: 15 }));

        // From within, as a button of the app's would from another thread.
        let calls = Arc::new(Mutex::new((0, Watch::new())));
        let inner = calls.clone();
        let watch = Watch::on_progress(move |_| {
            let mut inner = inner.lock().unwrap();
            inner.0 += 1;
            if inner.0 == 4 {
                inner.1.cancel();
            }
        });
        calls.lock().unwrap().1 = watch.clone();
        let mut values = vec![0.0; 5 * 48];
        let error = generator.generate_into(&watched(&watch), Buffer::F32(&mut values)).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        assert_eq!((calls.lock().unwrap().0, watch.is_cancelled()), (4, true));
        // It stays called off; the generator serves others.
        assert!(matches!(generator.generate(&watched(&watch)), Err(Error::Cancelled)));
        assert_eq!(generator.generate(&request(1, 5)).unwrap(), images);
    }
}

#[test]
fn a_mapped_file_makes_the_same_pictures() {
    for engine in present() {
        let name = "classes-f32.onnx";
        let options = Options { engine, threads: Some(1), ..Options::default() };
        // SAFETY: nobody writes to the fixtures while tests run.
        let mapped = unsafe { Generator::map(fixture(name), options.clone()) }.unwrap();
        assert_eq!(mapped.info(), load(name, engine).info());
        assert_eq!(mapped.generate(&request(2, 3)).unwrap(), load(name, engine).generate(&request(2, 3)).unwrap());
        // SAFETY: as above.
        let missing = unsafe { Generator::map(fixture("none.onnx"), options.clone()) }.unwrap_err();
        assert!(matches!(missing, Error::Io { .. }), "{missing}");
        let empty = tempfile::NamedTempFile::new().unwrap();
        // SAFETY: nobody else knows the file.
        let error = unsafe { Generator::map(empty.path(), options) }.unwrap_err();
        assert!(error.to_string().contains(&empty.path().display().to_string()), "{error}");
    }
}

/// ONNX Runtime uses the bytes of its own format where they lie, so that they must live as long as the session.
#[test]
fn a_mapped_ort_file_runs_after_everything_else_is_gone() {
    if !present().contains(&EngineChoice::OnnxRuntime) {
        eprintln!("skipped: no ONNX Runtime here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("classes.ort");
    dmd_runtime::rewrite(&fixture("classes-f32.onnx"), &path, dmd_runtime::Rewrite::Ort, None).unwrap();
    let expected = Generator::load(&path, Options::default()).unwrap().generate(&request(2, 3)).unwrap();
    // SAFETY: nobody writes to the file; its name goes, which leaves its bytes where they are.
    let mapped = unsafe { Generator::map(&path, Options::default()) }.unwrap();
    drop(folder);
    assert_eq!(mapped.generate(&request(2, 3)).unwrap(), expected);
    assert_eq!(mapped.info().classes, Info::read(fixture("classes-f32.onnx")).unwrap().classes);
}

#[test]
fn warming_up_changes_no_picture() {
    for engine in present() {
        for name in ["classes-u8.onnx", "steps-f32.onnx", "format-1.onnx"] {
            let (cold, warm) = (load(name, engine), load(name, engine));
            warm.warm_up().unwrap();
            assert_eq!(warm.generate(&request(5, 3)).unwrap(), cold.generate(&request(5, 3)).unwrap());
            warm.warm_up().unwrap();
        }
    }
}

#[test]
fn zero_threads_are_as_many_as_the_machine_offers() {
    for engine in present() {
        let load = |threads| {
            Generator::load(fixture("plain-f32.onnx"), Options { engine, threads, ..Options::default() }).unwrap()
        };
        assert_eq!(load(Some(0)).engine().warning, load(None).engine().warning);
        let pictures = [Some(0), None].map(|threads| load(threads).generate(&request(1, 2)).unwrap());
        assert_eq!(pictures[0], pictures[1], "{engine:?}");
    }
}
