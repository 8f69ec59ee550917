//! The CUDA kernels on a machine without a GPU: the programs in `tests/emulator` run them on the CPU against plain loops in
//! f64, in both orders of threads, with memory that faults past the end of an array. Skipped without a C++20 compiler.

use std::path::{Path, PathBuf};
use std::process::Command;

fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok();
    let found = named.into_iter().chain(["c++", "g++", "clang++"].map(String::from));
    found
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|found| found.status.success()))
}

fn run(test: &str) {
    if !cfg!(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))) {
        return println!("skipped: the emulator needs Linux");
    }
    let Some(compiler) = compiler() else { return println!("skipped: no C++ compiler") };
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator").join(test).with_extension("cpp");
    let program: PathBuf = folder.path().join(test);
    let built = Command::new(&compiler)
        .args(["-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-o"])
        .args([&program, &source])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&built.stderr);
    if !built.status.success() && text.contains("c++20") && text.contains("unrecognized") {
        return println!("skipped: {compiler} knows no C++20");
    }
    assert!(built.status.success(), "{}: {text}", source.display());
    let done = Command::new(&program).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    let last = out.lines().last().unwrap_or_default();
    println!("{test}: {last}");
    assert!(done.status.success(), "{test}: {out}\n{err}");
    assert!(last.ends_with(" 0 failed"), "{test}: {last}");
}

#[test]
fn attention_equals_plain_loops() {
    run("attention_test");
}

#[test]
fn group_norm_equals_plain_loops() {
    run("norm_test");
}

#[test]
fn the_optimiser_equals_plain_loops() {
    run("optimizer_test");
}

#[test]
fn philox_gives_the_known_answers() {
    run("philox_test");
}

#[test]
fn what_lies_between_equals_plain_loops() {
    run("pointwise_test");
}
