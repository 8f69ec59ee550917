//! Where ONNX Runtime's library is looked for. The first that loads and is new enough is taken:
//!
//! 1. `Options::library`, a file or a folder; where it is given, nothing else is tried;
//! 2. the environment's `ORT_DYLIB_PATH`, a file or a folder; a bare name is one in the current folder;
//! 3. the folder of the executable, and `lib/` in it;
//! 4. `onnxruntime/` in the cache folder ([`cache_folder`]): `$DMD_CACHE`, else `$XDG_CACHE_HOME/dmd`, else the
//!    system's own (`~/.cache/dmd`, on macOS `~/Library/Caches/dmd`, on Windows `%LOCALAPPDATA%\dmd`);
//! 5. the Python package `onnxruntime`: of `$VIRTUAL_ENV`, of `$CONDA_PREFIX`, of the `python3` on the path, of the
//!    user, of the system. Python itself is not run;
//! 6. the system's loader, under the library's plain name.
//!
//! In a folder, versioned names count too (`libonnxruntime.so.1.31.1`), the newest first. A file that is cut off, or made
//! for another machine, is passed over. A process loads one library and keeps it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

#[cfg(feature = "onnxruntime")]
pub(crate) mod binary;

/// A place where the library was looked for in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Why the search went there.
    pub place: String,
    /// The file or folder.
    pub path: PathBuf,
    /// Why it failed.
    pub reason: String,
}

/// The folder for what dmd keeps between runs; ONNX Runtime's library belongs into `onnxruntime/` in it.
/// `None` where the environment names neither a cache nor a home.
pub fn cache_folder() -> Option<PathBuf> {
    Host::here().cache_folder()
}

/// One line per place, for an error.
pub(crate) fn list(tried: &[Tried]) -> String {
    tried.iter().fold(String::new(), |mut text, Tried { place, path, reason }| {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  {place}: {}: {reason}", path.display());
        text
    })
}

/// A file or folder to try, or a name for the system's loader.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "onnxruntime"), allow(dead_code))]
pub(crate) struct Place {
    pub why: String,
    pub path: PathBuf,
    /// Whether the system's loader is asked for it.
    pub is_name: bool,
}

/// Reads one environment variable; `None` where it is not set, or empty.
type Variable = Box<dyn Fn(&str) -> Option<PathBuf>>;

/// What the search reads of the machine, so that a test can give it another one.
pub(crate) struct Host {
    variable: Variable,
    executable_folder: Option<PathBuf>,
    /// `/`, but for tests.
    root: PathBuf,
}

#[cfg_attr(not(feature = "onnxruntime"), allow(dead_code))]
impl Host {
    pub fn here() -> Self {
        Self {
            variable: Box::new(|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)),
            executable_folder: std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf())),
            root: PathBuf::from("/"),
        }
    }

    /// The places in the order of the search, the system's loader last.
    pub fn places(&self) -> Vec<Place> {
        let mut places = Vec::new();
        let mut add = |why: &str, path: PathBuf| places.push(Place { why: why.into(), path, is_name: false });
        if let Some(path) = self.variable("ORT_DYLIB_PATH") {
            add("ORT_DYLIB_PATH", path);
        }
        if let Some(folder) = &self.executable_folder {
            add("beside the executable", folder.clone());
            add("beside the executable", folder.join("lib"));
        }
        if let Some(folder) = self.cache_folder() {
            add("cache folder", folder.join("onnxruntime"));
        }
        for site_packages in self.python_folders() {
            add("Python package", site_packages.join("onnxruntime").join("capi"));
        }
        let names = loader_names().iter().map(PathBuf::from);
        places.extend(names.map(|path| Place { why: "system loader".into(), path, is_name: true }));
        places
    }

    fn cache_folder(&self) -> Option<PathBuf> {
        let home = || self.variable("HOME");
        let system = || match std::env::consts::OS {
            "windows" => self.variable("LOCALAPPDATA"),
            "macos" => Some(home()?.join("Library/Caches")),
            _ => Some(home()?.join(".cache")),
        };
        let under = |folder: PathBuf| folder.join("dmd");
        let xdg = || self.variable("XDG_CACHE_HOME").map(under);
        self.variable("DMD_CACHE").or_else(xdg).or_else(|| system().map(under))
    }

    /// Folders of installed Python packages; without the ones that do not exist, except where a variable names them.
    fn python_folders(&self) -> Vec<PathBuf> {
        let mut prefixes: Vec<PathBuf> =
            ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|v| self.variable(v)).collect();
        prefixes.extend(self.python_on_path());
        if let Some(home) = self.variable("HOME") {
            prefixes.push(home.join(".local"));
            prefixes.extend(subfolders(&home.join("Library/Python"), "3."));
        }
        for programs in ["APPDATA", "LOCALAPPDATA"].iter().filter_map(|v| self.variable(v)) {
            prefixes.extend(subfolders(&programs.join("Python"), "Python3"));
            prefixes.extend(subfolders(&programs.join("Programs").join("Python"), "Python3"));
        }
        prefixes.extend(["usr/local", "usr", "opt/homebrew"].map(|prefix| self.root.join(prefix)));

        let mut folders = Vec::new();
        for folder in prefixes.iter().flat_map(|prefix| site_packages(prefix)) {
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        folders
    }

    /// The prefix of the first Python on the path, as it is named there (a virtual environment) and as it resolves.
    fn python_on_path(&self) -> Vec<PathBuf> {
        let Some(path) = self.variable("PATH") else { return Vec::new() };
        let names = ["python3", "python", "python3.exe", "python.exe"];
        let mut programs = std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name)));
        let Some(program) = programs.find(|program| program.is_file()) else { return Vec::new() };
        let prefix = |program: &Path| {
            let folder = program.parent()?;
            Some(if folder.ends_with("bin") { folder.parent()?.to_path_buf() } else { folder.to_path_buf() })
        };
        let resolved = program.canonicalize().ok();
        [prefix(&program), resolved.as_deref().and_then(prefix)].into_iter().flatten().collect()
    }

    fn variable(&self, name: &str) -> Option<PathBuf> {
        (self.variable)(name)
    }
}

/// The libraries at a path, best first: the path itself where it is a file, else what the folder holds.
/// An error says what is there instead.
#[cfg_attr(not(feature = "onnxruntime"), allow(dead_code))]
pub(crate) fn libraries_at(path: &Path) -> Result<Vec<PathBuf>, String> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    if !path.exists() {
        return Err("does not exist".into());
    }
    // An unpacked release keeps the library in lib/, a Python package in capi/.
    let inner = ["", "lib", "capi", "onnxruntime/capi"].map(|inner| path.join(inner));
    let mut found: Vec<(Vec<u32>, PathBuf)> = Vec::new();
    for entry in inner.iter().filter_map(|folder| folder.read_dir().ok()).flatten().flatten() {
        if let Some(version) = entry.file_name().to_str().and_then(library_version) {
            found.push((version, entry.path()));
        }
    }
    found.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    match found.is_empty() {
        true => Err(format!("has no {}", loader_names()[0])),
        false => Ok(found.into_iter().map(|(_, path)| path).collect()),
    }
}

/// The version in the file name of ONNX Runtime's library; the plain name, a link to the wanted one, is the newest.
fn library_version(name: &str) -> Option<Vec<u32>> {
    let version = match std::env::consts::OS {
        "windows" => return (name.eq_ignore_ascii_case("onnxruntime.dll")).then(|| vec![u32::MAX]),
        "macos" | "ios" => name.strip_prefix("libonnxruntime")?.strip_suffix(".dylib")?,
        _ => name.strip_prefix("libonnxruntime.so")?,
    };
    match version {
        "" => Some(vec![u32::MAX]),
        _ => version.strip_prefix('.')?.split('.').map(|part| part.parse().ok()).collect(),
    }
}

/// The names to give to the system's loader.
fn loader_names() -> &'static [&'static str] {
    match std::env::consts::OS {
        "windows" => &["onnxruntime.dll"],
        "macos" | "ios" => &["libonnxruntime.dylib"],
        _ => &["libonnxruntime.so", "libonnxruntime.so.1"],
    }
}

/// The package folders under a Python prefix, on any system.
fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for lib in ["lib", "lib64"].map(|lib| prefix.join(lib)) {
        for python in subfolders(&lib, "python3") {
            folders.extend(["site-packages", "dist-packages"].map(|packages| python.join(packages)));
        }
        folders.push(lib.join("python").join("site-packages"));
    }
    folders.extend([prefix.join("Lib").join("site-packages"), prefix.join("site-packages")]);
    folders.retain(|folder| folder.is_dir());
    folders
}

/// Folders in `folder` whose names begin with `prefix`, in a fixed order, the highest first.
fn subfolders(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let named = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|n| n.starts_with(prefix));
    let entries = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries.filter(|path| named(path) && path.is_dir()).collect();
    found.sort_by(|a, b| b.cmp(a));
    found
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::collections::HashMap;
    use std::fs;

    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "no library").unwrap();
    }

    fn host(root: &Path, variables: &[(&str, &str)]) -> Host {
        let variables: HashMap<String, PathBuf> =
            variables.iter().map(|(name, path)| (name.to_string(), root.join(path))).collect();
        Host {
            variable: Box::new(move |name| variables.get(name).cloned()),
            executable_folder: Some(root.join("app")),
            root: root.into(),
        }
    }

    #[test]
    fn places_come_in_the_documented_order() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for packages in
            ["venv/lib/python3.12", "conda/lib/python3.11", "home/.local/lib/python3.11", "usr/lib/python3.9"]
        {
            fs::create_dir_all(root.join(packages).join("site-packages")).unwrap();
        }
        fs::create_dir_all(root.join("usr/lib/python3/dist-packages")).unwrap();
        touch(&root.join("tools/bin/python3"));
        fs::create_dir_all(root.join("tools/lib/python3.10/site-packages")).unwrap();
        let variables = [
            ("ORT_DYLIB_PATH", "set/libonnxruntime.so"),
            ("XDG_CACHE_HOME", "xdg"),
            ("HOME", "home"),
            ("VIRTUAL_ENV", "venv"),
            ("CONDA_PREFIX", "conda"),
            ("PATH", "tools/bin"),
        ];
        let places = host(root, &variables).places();
        let relative = |place: &Place| place.path.strip_prefix(root).unwrap_or(&place.path).display().to_string();
        let found: Vec<_> = places.iter().map(|place| (place.why.as_str(), relative(place))).collect();
        let expected = [
            ("ORT_DYLIB_PATH", "set/libonnxruntime.so"),
            ("beside the executable", "app"),
            ("beside the executable", "app/lib"),
            ("cache folder", "xdg/dmd/onnxruntime"),
            ("Python package", "venv/lib/python3.12/site-packages/onnxruntime/capi"),
            ("Python package", "conda/lib/python3.11/site-packages/onnxruntime/capi"),
            ("Python package", "tools/lib/python3.10/site-packages/onnxruntime/capi"),
            ("Python package", "home/.local/lib/python3.11/site-packages/onnxruntime/capi"),
            ("Python package", "usr/lib/python3.9/site-packages/onnxruntime/capi"),
            ("Python package", "usr/lib/python3/dist-packages/onnxruntime/capi"),
            ("system loader", "libonnxruntime.so"),
            ("system loader", "libonnxruntime.so.1"),
        ]
        .map(|(why, path)| (why, path.to_string()));
        assert_eq!(found, expected);
    }

    #[test]
    fn the_cache_folder_is_dmds_own_then_the_users_then_the_homes() {
        let root = Path::new("/r");
        let check = |variables: &[(&str, &str)], expected: Option<&str>| {
            assert_eq!(host(root, variables).cache_folder(), expected.map(|path| root.join(path)));
        };
        check(&[("DMD_CACHE", "own"), ("XDG_CACHE_HOME", "xdg"), ("HOME", "home")], Some("own"));
        check(&[("XDG_CACHE_HOME", "xdg"), ("HOME", "home")], Some("xdg/dmd"));
        check(&[("HOME", "home")], Some("home/.cache/dmd"));
        check(&[], None);
    }

    #[test]
    fn versioned_names_count_and_the_newest_comes_first() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let names = ["libonnxruntime.so.1.9.0", "libonnxruntime.so.1.31.1", "libonnxruntime.so.1.20.0"];
        for name in names.iter().chain(&["libonnxruntime_providers_shared.so", "libonnxruntime.so.txt", "readme"]) {
            touch(&root.join("capi").join(name));
        }
        let expected = [1, 2, 0].map(|i| root.join("capi").join(names[i]));
        assert_eq!(libraries_at(&root.join("capi")).unwrap(), expected);
        assert_eq!(libraries_at(root).unwrap(), expected, "a package's own folder will do");
        assert_eq!(libraries_at(&expected[0]).unwrap(), [expected[0].clone()]);
        touch(&root.join("capi/libonnxruntime.so"));
        assert_eq!(libraries_at(root).unwrap()[0], root.join("capi/libonnxruntime.so"));
        assert_eq!(libraries_at(&root.join("none")).unwrap_err(), "does not exist");
        fs::create_dir(root.join("empty")).unwrap();
        assert_eq!(libraries_at(&root.join("empty")).unwrap_err(), "has no libonnxruntime.so");
    }
}
