//! Which library is taken, in a process of its own: one process keeps the first that it loads.

#![cfg(all(target_os = "linux", feature = "onnxruntime"))]

use std::path::{Path, PathBuf};
use std::process::Command;

use dmd_runtime::{EngineChoice, EngineKind, Error, Generator, Options};

/// A library that says it is ONNX Runtime 1.16.0, by the system's C compiler; `None` where there is none.
fn old_library(folder: &Path) -> Option<PathBuf> {
    let source = folder.join("old.c");
    let code = r#"
        static const void *api(unsigned version) { return 0; }
        static const char *version(void) { return "1.16.0"; }
        static const struct { const void *(*api)(unsigned); const char *(*version)(void); } base = { api, version };
        const void *OrtGetApiBase(void) { return &base; }"#;
    std::fs::write(&source, code).unwrap();
    let library = folder.join("libonnxruntime.so.1.16.0");
    let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    status.is_ok_and(|status| status.success()).then_some(library)
}

/// One test, because it sets the environment of the whole process.
#[test]
fn a_library_that_is_old_or_cut_off_is_named_as_such_and_never_taken_silently() {
    let folder = tempfile::tempdir().unwrap();
    let Some(old) = old_library(folder.path()) else {
        eprintln!("skipped: no C compiler here");
        return;
    };
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/plain-f32.onnx");
    let load = |engine, library: Option<&Path>| {
        Generator::load(
            &model,
            Options { engine, library: library.map(Into::into), threads: Some(1), ..Options::default() },
        )
    };
    let expected = "libonnxruntime.so.1.16.0: is ONNX Runtime 1.16.0, expected 1.24 or newer";

    for engine in [EngineChoice::Auto, EngineChoice::OnnxRuntime] {
        for library in [old.as_path(), folder.path()] {
            let error = load(engine, Some(library)).unwrap_err();
            assert!(matches!(error, Error::NoLibrary { .. }) && error.to_string().contains(expected), "{error}");
        }
    }

    // A download that broke: the loader would die of it.
    let cut = folder.path().join("cut/libonnxruntime.so");
    std::fs::create_dir(folder.path().join("cut")).unwrap();
    let bytes = std::fs::read(&old).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() * 2 / 3]).unwrap();
    let error = load(EngineChoice::Auto, Some(&cut)).unwrap_err().to_string();
    assert!(error.contains("cut/libonnxruntime.so: is"), "{error}");

    // SAFETY: this process has one test, and no other thread of it reads the environment now.
    unsafe {
        ["VIRTUAL_ENV", "CONDA_PREFIX", "HOME", "PATH", "XDG_CACHE_HOME", "DMD_CACHE", "LD_LIBRARY_PATH"]
            .iter()
            .for_each(|name| std::env::remove_var(name));
        std::env::set_var("ORT_DYLIB_PATH", &old);
    }
    // A bare name is a file or a folder here, and never goes to the system's loader.
    std::env::set_current_dir(&folder).unwrap();
    for (name, expected) in [("cut", "cut/libonnxruntime.so: is"), ("libm.so.6", "libm.so.6: does not exist")] {
        // SAFETY: as above.
        unsafe { std::env::set_var("ORT_DYLIB_PATH", name) };
        match load(EngineChoice::OnnxRuntime, None) {
            Err(error) => assert!(error.to_string().contains(&format!("ORT_DYLIB_PATH: {expected}")), "{error}"),
            Ok(_) => eprintln!("this machine has a library for every process"),
        }
    }
    // SAFETY: as above.
    unsafe { std::env::set_var("ORT_DYLIB_PATH", &old) };
    match load(EngineChoice::OnnxRuntime, None) {
        Err(error) => {
            let text = error.to_string();
            for place in [expected, "ORT_DYLIB_PATH: ", "beside the executable: ", "system loader: "] {
                assert!(text.contains(place), "{text}");
            }
        }
        Ok(_) => eprintln!("this machine has a library for every process"),
    }
    if cfg!(feature = "tract") {
        let generator = load(EngineChoice::Auto, None).unwrap();
        let warning = generator.engine().warning.as_deref().unwrap();
        assert!(warning.contains("ORT_DYLIB_PATH") && warning.contains(expected), "{warning}");
        assert_eq!(warning.contains("tract"), generator.engine().kind == EngineKind::Tract, "{warning}");
        println!("{warning}");
    }
}
