//! In a process of its own, which has loaded no other library.

#![cfg(all(target_os = "linux", feature = "onnxruntime"))]

use std::ffi::{CStr, CString};
use std::ptr::null;

use dmd_capi::*;

/// A library that says it is ONNX Runtime 1.16.0 is refused in a sentence, and nothing slower is taken in its place.
#[test]
fn a_library_that_is_too_old_is_no_engine() {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("old.c"), folder.path().join("libonnxruntime.so.1.16.0"));
    let code = r#"
        static const void *api(unsigned version) { return 0; }
        static const char *version(void) { return "1.16.0"; }
        static const struct { const void *(*api)(unsigned); const char *(*version)(void); } base = { api, version };
        const void *OrtGetApiBase(void) { return &base; }"#;
    std::fs::write(&source, code).unwrap();
    let compiled =
        std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
    if !compiled.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no C compiler here");
        return;
    }
    let path = CString::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/plain-f32.onnx")).unwrap();
    let library = CString::new(library.to_str().unwrap()).unwrap();
    let options = Options {
        size: size_of::<Options>(),
        threads: 0,
        library: library.as_ptr(),
        engine: Engine::Auto as u32,
        require_accelerator: 0,
        accelerators: null(),
        low_memory: 0,
    };
    let mut generator = 0;
    assert_eq!(unsafe { dmd_open(path.as_ptr(), &options, &mut generator) }, Status::NoEngine);
    let error = unsafe { CStr::from_ptr(dmd_last_error()) }.to_str().unwrap();
    assert!(error.contains("is ONNX Runtime 1.16.0, expected 1."), "{error}");
}
