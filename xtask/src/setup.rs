//! What a checkout needs before cargo can build it and its programs can run, and the environment that says where
//! these things are. What it did goes to stderr: stdout belongs to the program that is started next.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::onnxruntime::{self, Library};

/// The variables that cargo and the built programs are started with.
#[derive(Debug, Default, PartialEq)]
pub struct Environment {
    /// The protobuf compiler, for the build of candle-onnx. `None`: the user's own, from PROTOC or PATH.
    pub protoc: Option<PathBuf>,
    /// ONNX Runtime's library. `None`: the user's own ORT_DYLIB_PATH, or none at all.
    pub onnxruntime: Option<PathBuf>,
}

impl Environment {
    pub fn variables(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let protoc = self.protoc.as_deref().map(|path| ("PROTOC", path));
        let onnxruntime = self.onnxruntime.as_deref().map(|path| ("ORT_DYLIB_PATH", path));
        protoc.into_iter().chain(onnxruntime)
    }

    pub fn command(&self, program: impl Into<OsString>) -> Command {
        let mut command = Command::new(program.into());
        command.envs(self.variables());
        command
    }
}

/// protoc and ONNX Runtime's library, which is fetched where it is missing. A machine where it cannot be had is no
/// error: tract runs the files there.
pub fn everything() -> Result<Environment> {
    let protoc = protoc_only()?.protoc;
    let onnxruntime = if let Some(path) = set_by_user("ORT_DYLIB_PATH") {
        eprintln!("ONNX Runtime: {} (ORT_DYLIB_PATH, as you set it)", path.display());
        None
    } else {
        match onnxruntime::find_or_fetch(&onnxruntime_folder()) {
            Ok(Library { path, origin }) => {
                eprintln!("ONNX Runtime: {} ({origin})", path.display());
                Some(path)
            }
            Err(reason) => {
                eprintln!("ONNX Runtime: none, so exported files run in tract, which is slower: {reason:#}");
                None
            }
        }
    };
    Ok(Environment { protoc, onnxruntime })
}

/// All that a build needs.
pub fn protoc_only() -> Result<Environment> {
    let environment = Environment { protoc: vendored_protoc(), onnxruntime: None };
    match (&environment.protoc, set_by_user("PROTOC")) {
        (_, Some(path)) => eprintln!("protoc: {} (PROTOC, as you set it)", path.display()),
        (Some(path), None) => eprintln!("protoc: {} (from the crate protoc-bin-vendored)", path.display()),
        (None, None) => eprintln!("protoc: no crate carries it for this platform; install it on PATH or set PROTOC"),
    }
    Ok(environment)
}

/// What is already here; nothing is fetched and nothing is said.
pub fn as_it_is() -> Environment {
    let onnxruntime = match set_by_user("ORT_DYLIB_PATH") {
        Some(_) => None,
        None => onnxruntime::find(&onnxruntime_folder()),
    };
    Environment { protoc: vendored_protoc(), onnxruntime }
}

/// The folder that holds the workspace. Cargo compiles this program anew when the checkout moves.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace's folder")
}

fn onnxruntime_folder() -> PathBuf {
    root().join(".cache").join("onnxruntime")
}

fn vendored_protoc() -> Option<PathBuf> {
    match set_by_user("PROTOC") {
        Some(_) => None,
        None => protoc_bin_vendored::protoc_bin_path().ok(),
    }
}

/// An empty variable counts as none, as it does for the programs that read these.
fn set_by_user(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_holds_the_workspace_manifest() {
        assert!(root().join("Cargo.toml").is_file());
        assert_eq!(onnxruntime_folder(), root().join(".cache/onnxruntime"));
    }

    #[test]
    fn only_known_paths_become_variables() {
        assert_eq!(Environment::default().variables().count(), 0);
        let environment = Environment { protoc: Some("a/protoc".into()), onnxruntime: Some("b/lib".into()) };
        let expected = vec![("PROTOC", Path::new("a/protoc")), ("ORT_DYLIB_PATH", Path::new("b/lib"))];
        assert_eq!(environment.variables().collect::<Vec<_>>(), expected);
    }
}
