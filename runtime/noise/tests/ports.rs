//! The noise in other languages, held to the crate: each port's check program answers streams, and its words must be
//! equal and its normals equal or neighbours. A port whose compiler or interpreter is not here is skipped, aloud.

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dmd_noise::Stream;

/// Seeds, purposes, indices and lengths: every carry between halves, and lengths that no block ends on.
const STREAMS: [(u64, u32, u64, usize); 7] = [
    (0, 0, 0, 4096),
    (7, 0x101, 5, 4095),
    (u32::MAX as u64, 0, 1, 1),
    ((1 << 53) + 1, 0, (1 << 33) + 3, 1023),
    (u64::MAX, u32::MAX, u64::MAX, 6),
    (0x8000_0000_8000_0000, 0x8000_0000, 0x8000_0000_8000_0000, 514),
    (1, 0, 1, 0),
];

#[test]
fn c_gives_the_same_noise() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("check");
    let mut compiler = Command::new(named("CC", "cc"));
    compiler
        .args(["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(port("check.c"))
        .arg("-lm");
    if compiled("C", &mut compiler) {
        check("C", Command::new(program));
    }
}

#[test]
fn cpp_gives_the_same_noise() {
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("check.cpp"), folder.path().join("check"));
    // The header, in C++: the check program itself is C, but for the type of malloc's result.
    let text = std::fs::read_to_string(port("check.c")).unwrap().replace("= malloc(", "= (float *)malloc(");
    std::fs::write(&source, text).unwrap();
    let mut compiler = Command::new(named("CXX", "c++"));
    compiler.args(["-O2", "-Wall", "-Wextra", "-Werror", "-I"]).arg(port("")).arg("-o").arg(&program).arg(source);
    if compiled("C++", &mut compiler) {
        check("C++", Command::new(program));
    }
}

#[test]
fn python_gives_the_same_noise() {
    let python = named("PYTHON", "python3");
    if starts("Python", &python, "--version") {
        let mut command = Command::new(python);
        command.arg(port("noise.py"));
        check("Python", command);
    }
}

#[test]
fn javascript_gives_the_same_noise() {
    if starts("JavaScript", "node".as_ref(), "--version") {
        let mut command = Command::new("node");
        command.arg(port("check.mjs"));
        check("JavaScript", command);
    }
}

#[test]
fn kotlin_gives_the_same_noise() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("check.jar");
    let kotlinc = named("KOTLINC", "kotlinc");
    if !starts("Kotlin", "java".as_ref(), "-version") || !starts("Kotlin", &kotlinc, "-version") {
        return;
    }
    let mut compiler = Command::new(kotlinc);
    compiler.args(["-Werror", "-include-runtime", "-d"]).arg(&program).args([port("Noise.kt"), port("check.kt")]);
    assert!(compiled("Kotlin", &mut compiler));
    let mut java = Command::new("java");
    java.arg("-jar").arg(program);
    check("Kotlin", java);
}

#[test]
fn swift_gives_the_same_noise() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("check");
    let mut compiler = Command::new(named("SWIFTC", "swiftc"));
    compiler.args(["-warnings-as-errors", "-O", "-o"]).arg(&program).args([port("Noise.swift"), port("main.swift")]);
    if compiled("Swift", &mut compiler) {
        check("Swift", Command::new(program));
    }
}

/// Feeds the program every stream and compares its answers.
fn check(language: &str, mut program: Command) {
    let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let asked: String =
        STREAMS.iter().map(|(seed, purpose, index, n)| format!("{seed} {purpose} {index} {n}\n")).collect();
    child.stdin.take().unwrap().write_all(asked.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{language}: {}", output.status);
    let answers = String::from_utf8(output.stdout).unwrap();
    let mut lines =
        answers.lines().map(|line| line.split_whitespace().map(|n| n.parse().unwrap()).collect::<Vec<u32>>());
    let mut neighbours = 0;
    for (seed, purpose, index, n) in STREAMS {
        let stream = Stream::new(seed, purpose, index);
        assert_eq!(lines.next().unwrap(), stream.words(n), "{language}: words of {stream:?}");
        let found = lines.next().unwrap();
        assert_eq!(found.len(), n, "{language}: normals of {stream:?}");
        for (i, (found, expected)) in found.into_iter().zip(stream.normal(n)).enumerate() {
            let apart = found.abs_diff(expected.to_bits());
            let found = f32::from_bits(found);
            assert!(apart <= 1, "{language}: normal {i} of {stream:?} is {found}, expected {expected}");
            neighbours += apart;
        }
    }
    assert_eq!(lines.next(), None, "{language}: more lines than were asked for");
    let n: usize = STREAMS.iter().map(|stream| stream.3).sum();
    println!("{language}: {n} words and normals, {neighbours} of the normals a neighbour");
}

/// Runs a compiler that may not be here; one that is here must succeed.
fn compiled(language: &str, compiler: &mut Command) -> bool {
    match compiler.status() {
        Ok(status) => assert!(status.success(), "{language}: {compiler:?}: {status}"),
        Err(error) => {
            eprintln!("skipped: {language}: {:?} cannot be started: {error}", compiler.get_program());
            return false;
        }
    }
    true
}

fn starts(language: &str, program: &std::ffi::OsStr, version: &str) -> bool {
    let found = Command::new(program).arg(version).stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.inspect_err(|error| eprintln!("skipped: {language}: {program:?} cannot be started: {error}")).is_ok()
}

/// A program by its environment variable, or by its usual name.
fn named(variable: &str, name: &str) -> OsString {
    env::var_os(variable).unwrap_or_else(|| name.into())
}

fn port(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("ports").join(name)
}
