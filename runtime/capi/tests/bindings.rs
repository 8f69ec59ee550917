//! The bindings of other languages over the library, as an app has them: Python's wheel is built, installed and used,
//! Kotlin runs on the desktop's JVM, Swift's package is tested. What is not here is skipped, aloud; `cargo xtask
//! bindings-test` fetches what can be had.

#![cfg(all(target_os = "linux", feature = "tract"))]

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const PAGE: &str = include_str!("../../../docs/runtime.md");
const README: &str = include_str!("../../../README.md");

#[test]
fn python_makes_pictures_from_an_installed_wheel() {
    let Some(python) = env::var_os("DMD_BINDINGS_PYTHON") else {
        eprintln!("skipped: Python: DMD_BINDINGS_PYTHON names no Python with pip, numpy and hatchling");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (package, site) = (folder.path().join("python"), folder.path().join("site"));
    copy(&bindings("python"), &package);
    let wheel = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "."];
    let built = Command::new(&python).args(wheel).arg(&package).current_dir(folder.path()).output().unwrap();
    let reason = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(!built.status.success() && reason.contains("has no libdmd_capi.so"), "without a library: {reason}");

    fs::copy(library(), package.join("src/dmd_runtime/libdmd_capi.so")).unwrap();
    succeed(Command::new(&python).args(wheel).arg(&package).current_dir(folder.path()));
    let wheel = folder.path().join("dmd_runtime-0.1.0-py3-none-linux_x86_64.whl");
    assert!(cfg!(not(target_arch = "x86_64")) || wheel.is_file(), "{:?}", fs::read_dir(&folder).unwrap());
    let install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"];
    succeed(Command::new(&python).args(install).arg(&site).arg(&wheel));
    // From another folder, so that only the installed package is found.
    let here = |command: &mut Command| {
        command.current_dir(folder.path()).env("PYTHONPATH", &site).env("DMD_FIXTURES", fixtures());
        command.env_remove("DMD_LIBRARY");
        succeed(command);
    };
    here(Command::new(&python).args(["-m", "unittest", "discover", "-s"]).arg(package.join("tests")));

    fs::copy(fixtures().join("classes-f32.onnx"), folder.path().join("generator.onnx")).unwrap();
    for (code, picture) in [(code_of(PAGE, "python"), "0.png"), (code_of(README, "python"), "picture.png")] {
        here(Command::new(&python).args(["-c", code]));
        let picture = image::open(folder.path().join(picture)).unwrap();
        assert_eq!((picture.width(), picture.height()), (6, 8));
    }
}

#[test]
fn the_rust_of_the_readme_is_the_example() {
    let example = include_str!("../../examples/embed.rs");
    assert!(example.ends_with(code_of(README, "rust")), "{}", code_of(README, "rust"));
}

#[test]
fn kotlin_makes_pictures_on_the_desktops_jvm() {
    let kotlinc = env::var_os("KOTLINC").unwrap_or_else(|| "kotlinc".into());
    let Some(java_home) = java_home().filter(|_| starts(&kotlinc)) else {
        eprintln!("skipped: Kotlin: {kotlinc:?} or java cannot be started");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (jni, jar) = (folder.path().join("libdmd_jni.so"), folder.path().join("check.jar"));
    let include = java_home.join("include");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O2", "-std=c99", "-Wall", "-Wextra", "-Werror"]).arg("-o").arg(&jni);
    compiler.arg("-I").arg(&include).arg("-I").arg(include.join("linux")).arg("-I").arg(source("include"));
    compiler.arg(bindings("kotlin/src/main/jni/dmd_jni.c")).arg("-L").arg(libraries()).arg("-ldmd_capi");
    // As CMakeLists.txt asks for Android.
    let flag = "-Wl,-z,max-page-size=16384";
    let list = fs::read_to_string(bindings("kotlin/src/main/jni/CMakeLists.txt")).unwrap();
    assert!(list.contains(flag));
    succeed(compiler.arg(flag).arg(format!("-Wl,-rpath,{}", libraries().display())));
    lies_on_pages_of_16_kb(&jni);

    let page = folder.path().join("Page.kt");
    fs::write(&page, code_of(PAGE, "kotlin")).unwrap();
    let mut compiler = Command::new(kotlinc);
    compiler.args(["-Werror", "-include-runtime", "-d"]).arg(&jar).arg(bindings("kotlin/src")).arg(page);
    succeed(&mut compiler);
    let mut java = Command::new("java");
    java.arg("-Xcheck:jni").arg(format!("-Djava.library.path={}", folder.path().display()));
    let output = succeed(java.arg("-jar").arg(&jar).arg(fixtures()));
    assert!(output.contains(" checks passed") && !output.contains("WARNING in native"), "{output}");
}

/// By build.rs, for Android and, where it costs some bytes, for x86-64 anywhere.
#[cfg(target_arch = "x86_64")]
#[test]
fn the_library_lies_on_pages_of_16_kb() {
    lies_on_pages_of_16_kb(&library());
}

#[test]
fn swift_calls_nothing_that_the_header_does_not_have() {
    let header = fs::read_to_string(source("include/dmd.h")).unwrap();
    let known: Vec<&str> = names(&header).collect();
    let swift = fs::read_to_string(bindings("swift/Sources/DmdRuntime/Generator.swift")).unwrap();
    assert!(names(&swift).count() > 20);
    names(&swift).for_each(|name| assert!(known.contains(&name), "dmd.h has no {name}"));
}

#[test]
fn swift_makes_pictures_in_its_own_tests() {
    let swift = env::var_os("SWIFT").unwrap_or_else(|| "swift".into());
    if !starts(&swift) {
        eprintln!("skipped: Swift: {swift:?} cannot be started");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // The module map finds the header beside it, as in the repository.
    let package = folder.path().join("bindings/swift");
    copy(&bindings("swift"), &package);
    copy(&source("include"), &folder.path().join("capi/include"));
    fs::write(package.join("Tests/DmdRuntimeTests/Page.swift"), code_of(PAGE, "swift")).unwrap();
    let mut test = Command::new(swift);
    test.args(["test", "-Xlinker"]).arg(format!("-L{}", libraries().display())).current_dir(&package);
    succeed(test.env("LD_LIBRARY_PATH", libraries()).env("DMD_FIXTURES", fixtures()));
}

/// Names of the ABI in a text.
fn names(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("dmd_") || word.starts_with("DMD_"))
}

/// The first block of code of this language in a page.
fn code_of(page: &'static str, language: &str) -> &'static str {
    let (_, code) = page.split_once(&format!("```{language}\n")).unwrap();
    code.split_once("```").unwrap().0
}

/// Android 15 and later refuse other libraries on devices with such pages.
fn lies_on_pages_of_16_kb(library: &Path) {
    use object::read::elf::{ElfFile64, ProgramHeader};
    let bytes = fs::read(library).unwrap();
    let file = ElfFile64::<object::Endianness>::parse(&*bytes).unwrap();
    let endian = file.endian();
    let loads = file.elf_program_headers().iter().filter(|header| header.p_type(endian) == object::elf::PT_LOAD);
    let alignments: Vec<u64> = loads.map(|header| header.p_align(endian)).collect();
    assert!(alignments.len() > 1 && alignments.iter().all(|bytes| *bytes >= 16384), "{library:?}: {alignments:?}");
}

fn java_home() -> Option<PathBuf> {
    let output = Command::new("java").args(["-XshowSettings:properties", "-version"]).output().ok()?;
    let settings = String::from_utf8_lossy(&output.stderr).into_owned();
    let home = PathBuf::from(settings.lines().find_map(|line| line.trim().strip_prefix("java.home = "))?);
    home.join("include/jni.h").is_file().then_some(home)
}

fn starts(program: &OsString) -> bool {
    Command::new(program).arg("-version").output().is_ok()
}

/// What it printed.
fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (name, path) = (entry.file_name(), entry.path());
        if entry.file_type().unwrap().is_file() {
            // What git does not know, an earlier library above all, stays behind.
            if path.extension().is_none_or(|extension| extension != "so" && extension != "whl") {
                fs::copy(&path, to.join(name)).unwrap();
            }
        } else if name != ".build" && name != "__pycache__" {
            copy(&path, &to.join(name));
        }
    }
}

/// Where cargo puts the libraries that this test was linked beside.
fn libraries() -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().into()
}

fn library() -> PathBuf {
    libraries().join("libdmd_capi.so")
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn bindings(name: &str) -> PathBuf {
    source("../bindings").join(name)
}

fn fixtures() -> PathBuf {
    source("../tests/fixtures").canonicalize().unwrap()
}
