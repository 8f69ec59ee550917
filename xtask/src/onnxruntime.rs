//! ONNX Runtime's library, out of the wheel that Python's pip fetches: the one source that every machine with a
//! package registry can reach, and that carries a library which loads on its own.

use std::env::consts::{ARCH, OS};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Tried first, because these are the bytes that the project was tested with.
const VERSION: &str = "1.31.1";

/// Taken where there is no build of `VERSION` for the platform or its Python.
const FALLBACK: &str = "onnxruntime>=1.24";

/// sha256 of the library in the wheels of `VERSION`. On Linux it is the same in the wheel of every Python (seen for
/// 3.11, 3.12 and 3.14 on x86-64). On macOS and Windows each Python's wheel carries its own, and pip's check of the
/// wheel has to do.
const SHA256: [(&str, &str, &str); 2] = [
    ("linux", "x86_64", "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3"),
    ("linux", "aarch64", "8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467"),
];

pub struct Library {
    pub path: PathBuf,
    /// How it came here, for the user.
    pub origin: String,
}

/// The library under `folder`; fetched into it where it is missing, under its versioned and its plain name.
pub fn find_or_fetch(folder: &Path) -> Result<Library> {
    find_or_fetch_one_of(folder, &[format!("onnxruntime=={VERSION}"), FALLBACK.into()])
}

/// The same of one version and no other; a folder for each.
pub fn find_or_fetch_version(folder: &Path, version: &str) -> Result<Library> {
    find_or_fetch_one_of(folder, &[format!("onnxruntime=={version}")])
}

fn find_or_fetch_one_of(folder: &Path, requirements: &[String]) -> Result<Library> {
    if let Some(path) = find(folder) {
        return Ok(Library { path, origin: "found".into() });
    }
    let python = python_with_pip()?;
    let aside = Aside::new(folder)?;
    let wheel = download(python, requirements, &aside.0)?;
    let version = wheel_version(&wheel).unwrap_or("of unknown version").to_owned();
    let library = unpack(python, &wheel, &aside.0, &version)?;
    let path = install(&library, folder)?;
    Ok(Library { path, origin: format!("{version}, fetched by {python} -m pip") })
}

/// The library by its plain name, which is what programs search for.
pub fn find(folder: &Path) -> Option<PathBuf> {
    let path = folder.join(plain_name(OS));
    path.is_file().then_some(path)
}

fn plain_name(os: &str) -> &'static str {
    match os {
        "windows" => "onnxruntime.dll",
        "macos" | "ios" => "libonnxruntime.dylib",
        _ => "libonnxruntime.so",
    }
}

/// Windows has `python` and `py`, most others `python3`; each may be a stub, or lack pip.
pub fn python_with_pip() -> Result<&'static str> {
    let has_pip = |python: &&str| {
        let pip = Command::new(python).args(["-m", "pip", "--version"]).stdin(Stdio::null()).output();
        pip.is_ok_and(|output| output.status.success())
    };
    let remedy = "no Python with pip found (tried python3, python, py); install one and run cargo xtask setup";
    ["python3", "python", "py"].into_iter().find(has_pip).context(remedy)
}

/// The wheel of the first of these that there is.
fn download(python: &str, requirements: &[String], folder: &Path) -> Result<PathBuf> {
    let mut reason = String::new();
    let mut is_there = |requirement: &String| -> Result<bool> {
        eprintln!("ONNX Runtime: fetching {requirement} with {python} -m pip (24 MB)");
        let output = pip_download(python, requirement, folder)?;
        reason = last_error(&String::from_utf8_lossy(&output.stderr)).into();
        Ok(output.status.success())
    };
    let mut found = false;
    for requirement in requirements {
        found = found || is_there(requirement)?;
    }
    ensure!(
        found,
        "{python} -m pip download found none for this machine ({reason}); once it can, run cargo xtask setup"
    );
    let mut files = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    files.find(|path| path.extension().is_some_and(|extension| extension == "whl")).context("pip left no wheel")
}

/// The user's index and proxy settings hold; few retries, because tract is there when the network is not.
fn pip_download(python: &str, requirement: &str, folder: &Path) -> io::Result<Output> {
    Command::new(python)
        .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"])
        .args(["--disable-pip-version-check", "--retries", "1", "--timeout", "30", requirement, "--dest"])
        .arg(folder)
        .env("PIP_REQUIRE_VIRTUALENV", "0")
        .stdin(Stdio::null())
        .output()
}

/// pip's own reason: the last line that it marks as an error, without the mark.
fn last_error(stderr: &str) -> &str {
    let error = stderr.lines().rev().find_map(|line| line.trim().strip_prefix("ERROR: "));
    error.or(stderr.lines().last()).unwrap_or("pip gave no reason")
}

/// `onnxruntime-1.31.1-cp311-cp311-win_amd64.whl`: the second field.
fn wheel_version(wheel: &Path) -> Option<&str> {
    wheel.file_stem()?.to_str()?.split('-').nth(1)
}

fn unpack(python: &str, wheel: &Path, folder: &Path, version: &str) -> Result<PathBuf> {
    let mut command = Command::new(python);
    command.args(["-c", include_str!("unpack.py")]).args([wheel, folder]).stdin(Stdio::null());
    let output = command.output()?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let mut lines = stdout.lines();
    match (output.status.success(), lines.next(), lines.next()) {
        (true, Some(name), Some(sha256)) => {
            check_sha256(name, version, sha256)?;
            Ok(folder.join(name))
        }
        _ => bail!("unpacking the wheel failed: {}", last_error(&String::from_utf8_lossy(&output.stderr))),
    }
}

fn check_sha256(name: &str, version: &str, found: &str) -> Result<()> {
    let expected = SHA256.iter().find(|(os, arch, _)| (version, *os, *arch) == (VERSION, OS, ARCH));
    match expected {
        Some((_, _, expected)) if *expected != found => {
            bail!("{name} has sha256 {found}, expected {expected}; it is not used")
        }
        _ => Ok(()),
    }
}

/// Moves the library into `folder`. The plain name comes last: where it is, the library is whole.
fn install(library: &Path, folder: &Path) -> Result<PathBuf> {
    let versioned = folder.join(library.file_name().context("the library has no name")?);
    let plain = folder.join(plain_name(OS));
    fs::rename(library, &versioned).with_context(|| format!("{} cannot be written", versioned.display()))?;
    if versioned != plain {
        // A hard link where the file system has them, because 30 MB twice serve nobody.
        let linked = library.with_file_name("plain");
        fs::hard_link(&versioned, &linked).or_else(|_| fs::copy(&versioned, &linked).map(drop))?;
        fs::rename(&linked, &plain)?;
    }
    Ok(plain)
}

/// A folder beside the library for what is not whole yet, removed at the end.
struct Aside(PathBuf);

impl Aside {
    fn new(folder: &Path) -> Result<Self> {
        let aside = folder.join(format!(".fetch-{}", std::process::id()));
        fs::create_dir_all(&aside).with_context(|| format!("{} cannot be made", aside.display()))?;
        Ok(Self(aside))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // What stays behind is in a git-ignored cache and harms nothing.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_are_those_of_the_platforms() {
        let names = ["linux", "android", "macos", "windows"].map(plain_name);
        assert_eq!(names, ["libonnxruntime.so", "libonnxruntime.so", "libonnxruntime.dylib", "onnxruntime.dll"]);
    }

    #[test]
    fn wheel_names_give_their_version() {
        let wheel = Path::new("x-y/onnxruntime-1.23.2-cp310-cp310-macosx_13_0_x86_64.whl");
        assert_eq!(wheel_version(wheel), Some("1.23.2"));
        assert_eq!(wheel_version(Path::new("onnxruntime.whl")), None);
    }

    #[test]
    fn pip_errors_shrink_to_their_last_line() {
        let stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution\nnote\n";
        assert_eq!(last_error(stderr), "No matching distribution");
        assert_eq!(last_error("Traceback\nOSError: disk full"), "OSError: disk full");
        assert_eq!(last_error(""), "pip gave no reason");
    }

    #[test]
    fn a_changed_library_of_the_known_version_is_refused() {
        let known = SHA256.iter().any(|(os, arch, _)| (*os, *arch) == (OS, ARCH));
        assert_eq!(check_sha256("library", VERSION, "0123").is_err(), known);
        assert!(check_sha256("library", "1.20.0", "0123").is_ok());
    }

    #[test]
    fn installed_library_is_found_under_its_plain_name() {
        let folder = std::env::temp_dir().join(format!("xtask-install-{}", std::process::id()));
        let aside = Aside::new(&folder).unwrap();
        assert_eq!(find(&folder), None);

        let library = aside.0.join("libonnxruntime.versioned");
        fs::write(&library, "code").unwrap();
        let plain = install(&library, &folder).unwrap();
        drop(aside);

        assert_eq!(find(&folder), Some(plain.clone()));
        assert_eq!(fs::read_to_string(plain).unwrap(), "code");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "the versioned and the plain name, nothing else");
        fs::remove_dir_all(&folder).unwrap();
    }
}
