//! Says what to do where protoc is missing. candle-onnx compiles the ONNX message definitions when it is built, and
//! its own message does not name this project's remedy; this script has no dependencies, so it is heard first.

use std::path::Path;
use std::{env, process};

fn main() {
    // PROTOC is also what makes candle-onnx build anew. PATH is not watched: a script that failed runs again anyway,
    // and one that passed has nothing left to say.
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=PROTOC");
    let named = env::var_os("PROTOC").is_some_and(|path| Path::new(&path).is_file());
    let path = env::var_os("PATH").unwrap_or_default();
    let executable = format!("protoc{}", env::consts::EXE_SUFFIX);
    if !named && !env::split_paths(&path).any(|folder| folder.join(&executable).is_file()) {
        println!(
            "cargo::error=candle-onnx needs protoc, the protobuf compiler, and there is none: run `cargo xtask setup` \
             (or `cargo xtask test`), or install protobuf-compiler, or set PROTOC to its path"
        );
        process::exit(1);
    }
}
