//! Programs in C and C++ against the library as an app links it: compiled without a warning, run, and by valgrind without a
//! fault or a leak. What is not here (a compiler, valgrind) is skipped, aloud.

#![cfg(all(unix, feature = "tract"))]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dmd_runtime::{Generator, Options, Request};

const C: [&str; 5] = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"];
const CPP: [&str; 5] = ["-std=c++17", "-pedantic", "-Wall", "-Wextra", "-Werror"];

#[test]
fn the_c_example_makes_the_picture_that_rust_makes() {
    let folder = tempfile::tempdir().unwrap();
    let Some(program) = compiled(folder.path(), "cc", &C, "examples/generate.c") else { return };
    for (seed, class) in [("7", None), ("18446744073709551615", Some(2))] {
        let png = folder.path().join("picture.png");
        let model = fixture("classes-f32.onnx");
        let name = class.map(|class: usize| Generator::load(&model, tract()).unwrap().info().classes[class].clone());
        let output = Command::new(&program).arg(&model).arg(&png).arg(seed).args(&name).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let generator = Generator::load(&model, Options::default()).unwrap();
        let labels = class.map(Into::into).into_iter().collect();
        let request = Request { seed: seed.parse().unwrap(), labels, ..Request::default() };
        let expected = generator.generate(&request).unwrap().to_images()[0].to_rgba8();
        assert_eq!(image::load_from_memory(&std::fs::read(&png).unwrap()).unwrap().to_rgba8(), expected);
    }
    let missing = Command::new(&program).args(["missing.onnx", "out.png"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing).contains("dmd_open: missing.onnx: No such file"), "{}", text(&missing));
}

#[test]
fn the_cpp_example_makes_pictures_of_every_class_on_two_threads() {
    let folder = tempfile::tempdir().unwrap();
    let Some(program) = compiled(folder.path(), "c++", &CPP, "examples/generate.cpp") else { return };
    let output = Command::new(&program).arg(fixture("classes-f32.onnx")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let generator = Generator::load(fixture("classes-f32.onnx"), Options::default()).unwrap();
    let labels = (0..3).map(Into::into).collect();
    let images = generator.generate(&Request { seed: 7, batch: 3, labels, ..Request::default() }).unwrap().to_f32();
    for ((line, class), image) in text(&output).lines().zip(&generator.info().classes).zip(images.outer_iter()) {
        let value = line.strip_prefix(class.as_str()).unwrap().trim().parse::<f32>().unwrap();
        assert!((value - image[[0, 0, 0]]).abs() < 1e-5, "{line}");
    }
}

#[test]
fn the_code_of_the_page_compiles_and_makes_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let page = include_str!("../../../docs/runtime.md");
    let code = page.split_once("```c\n").unwrap().1.split_once("```").unwrap().0;
    std::fs::write(folder.path().join("page.c"), code).unwrap();
    let name = folder.path().join("page.c");
    let Some(program) = compiled(folder.path(), "cc", &C, name.to_str().unwrap()) else { return };
    let run = || Command::new(&program).current_dir(folder.path()).output().unwrap();
    let missing = run();
    assert!(text(&missing).starts_with("generator.onnx: No such file"), "{}", text(&missing));
    std::fs::copy(fixture("classes-f32.onnx"), folder.path().join("generator.onnx")).unwrap();
    let output = run();
    assert!(output.status.success() && text(&output).starts_with("a picture"), "{}", text(&output));
}

#[test]
fn every_function_survives_its_misuse_and_says_what_was_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let Some(program) = compiled(folder.path(), "cc", &C, "tests/misuse.c") else { return };
    let output = Command::new(&program).arg(fixture("classes-f32.onnx")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn programs_are_clean_in_valgrind() {
    let folder = tempfile::tempdir().unwrap();
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("skipped: no valgrind here");
        return;
    }
    let Some(program) = compiled(folder.path(), "cc", &C, "tests/misuse.c") else { return };
    // What is possibly lost belongs to the threads of a pool, which live as long as the process.
    let valgrind = [
        "--quiet",
        "--error-exitcode=99",
        "--leak-check=full",
        "--errors-for-leak-kinds=definite",
        "--show-leak-kinds=definite",
    ];
    let output =
        Command::new("valgrind").args(valgrind).arg(&program).arg(fixture("classes-f32.onnx")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn the_static_library_links_into_a_program_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("generate");
    let mut compiler = Command::new("cc");
    compiler.args(C).arg(source("examples/generate.c")).arg("-I").arg(source("include")).arg("-o").arg(&program);
    compiler.arg(libraries().join("libdmd_capi.a")).args(["-lpthread", "-ldl", "-lm"]);
    if cfg!(target_os = "macos") {
        compiler.args(["-framework", "CoreFoundation", "-framework", "Security"]);
    }
    if !runs(&mut compiler) {
        return;
    }
    let (model, png) = (fixture("plain-f32.onnx"), folder.path().join("picture.png"));
    let output = Command::new(&program).arg(model).arg(&png).output().unwrap();
    assert!(output.status.success() && png.is_file(), "{}", text(&output));
}

/// A program against the shared library, or `None` where there is no compiler.
fn compiled(folder: &Path, compiler: &str, flags: &[&str], name: &str) -> Option<PathBuf> {
    let program = folder.join("program");
    let mut command = Command::new(compiler);
    command.args(flags).arg(source(name)).arg("-I").arg(source("include")).arg("-pthread").arg("-o").arg(&program);
    let rpath = format!("-Wl,-rpath,{}", libraries().display());
    runs(command.arg("-L").arg(libraries()).args(["-ldmd_capi", &rpath])).then_some(program)
}

/// Whether the compiler is here; it must succeed then.
fn runs(compiler: &mut Command) -> bool {
    match compiler.output() {
        Ok(output) => assert!(output.status.success(), "{compiler:?}: {}", text(&output)),
        Err(error) => {
            eprintln!("skipped: {:?} cannot be started: {error}", compiler.get_program());
            return false;
        }
    }
    true
}

/// Where cargo puts the libraries that this test was linked beside.
fn libraries() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().into()
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn fixture(name: &str) -> PathBuf {
    source("../tests/fixtures").join(name)
}

fn tract() -> Options {
    Options { engine: dmd_runtime::EngineChoice::Tract, ..Options::default() }
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].concat().iter().map(|byte| char::from(*byte)).collect()
}
