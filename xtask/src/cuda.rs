//! `cargo xtask cuda-check`: compiles and links the program for CUDA on a machine that has neither a GPU nor CUDA, and has
//! clippy read all that only a GPU runs, its tests too. The toolkit comes from Python's package index into
//! `.cache/cuda`; the driver's library, which exists only beside a GPU, is stood in for by one of the same names that
//! does nothing. What is built can be run elsewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::venv::{self, succeed};
use crate::{chores, setup};

const PACKAGES: [&str; 2] =
    ["cuda-toolkit[nvcc,cudart,cccl,crt,nvvm,curand,nvrtc,cublas]==13.0.2", "nvidia-cudnn-cu13==9.15.0.57"];

/// The oldest GPUs that the kernels are compiled for, unless CUDA_COMPUTE_CAP says otherwise: Ampere, which has bf16.
const COMPUTE_CAP: &str = "80";

/// Lays out the toolkit and stops.
pub fn fetch() -> Result<ExitCode> {
    toolkit().map(|_| ExitCode::SUCCESS)
}

pub fn check() -> Result<ExitCode> {
    let environment = setup::protoc_only()?;
    let site = toolkit()?;
    let (cuda, cudnn) = (site.join("nvidia").join("cu13"), site.join("nvidia").join("cudnn"));
    let library_path = [cuda.join("lib"), cuda.join("lib").join("stubs"), cudnn.join("lib")]
        .into_iter()
        .chain(std::env::var_os("LIBRARY_PATH").iter().flat_map(std::env::split_paths))
        .collect::<Vec<_>>();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(cuda.join("bin")).chain(std::env::split_paths(&path));
    let (path, library_path) = (std::env::join_paths(path)?, std::env::join_paths(library_path)?);
    let compute_cap = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| COMPUTE_CAP.into());
    let cargo = |task: &str, args: &[&str]| {
        let mut cargo = chores::cargo(&environment);
        cargo
            .args([task, "--release", "--workspace", "--features", "dmd/cuda"])
            .args(args)
            .env("CUDA_HOME", &cuda)
            .env("CUDA_PATH", &cuda)
            .env("CUDNN_HOME", &cudnn)
            .env("NVCC", cuda.join("bin").join("nvcc"))
            .env("CUDA_COMPUTE_CAP", &compute_cap)
            .env("PATH", &path)
            .env("LIBRARY_PATH", &library_path)
            // Beside the CPU's program, not over it.
            .env("CARGO_TARGET_DIR", setup::root().join("target").join("cuda"));
        cargo
    };
    succeed(&mut cargo("build", &[]))?;
    eprintln!("compiled and linked: target/cuda/release/dmd, which needs a GPU with its driver, and cuDNN, to run");
    // The tests are not linked: there is nothing here to run them on, and each program is as large as dmd.
    if chores::is_installed(&environment, "clippy")? {
        succeed(&mut cargo("clippy", &["--all-targets", "--", "-D", "warnings"]))?;
    } else {
        succeed(&mut cargo("check", &["--all-targets"]))?;
    }
    eprintln!("checked: what only a GPU runs, with its tests");
    Ok(ExitCode::SUCCESS)
}

/// Where the packages lie, fetched and made complete where they were not.
fn toolkit() -> Result<PathBuf> {
    ensure!(
        cfg!(unix),
        "cuda-check lays out a toolkit for Linux; elsewhere install CUDA and build with --features cuda"
    );
    let folder = setup::root().join(".cache").join("cuda");
    let python = venv::made(&folder, &PACKAGES, "CUDA's toolkit (3 GB)")?;
    let site = venv::site_packages(&python)?;
    let cuda = site.join("nvidia").join("cu13");
    for lib in [cuda.join("lib"), site.join("nvidia").join("cudnn").join("lib")] {
        name_without_version(&lib)?;
    }
    let stubs = cuda.join("lib").join("stubs");
    if !stubs.join("libcuda.so").exists() {
        fs::create_dir_all(&stubs).with_context(|| format!("{} cannot be made", stubs.display()))?;
        stand_in(&cuda.join("include"), &stubs)?;
    }
    Ok(site)
}

/// `libx.so` beside every `libx.so.13`, which is all that a package brings.
fn name_without_version(lib: &Path) -> Result<()> {
    for entry in fs::read_dir(lib).with_context(|| lib.display().to_string())? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let Some((plain, _)) = name.split_once(".so.") else { continue };
        let link = lib.join(format!("{plain}.so"));
        if !link.exists() {
            #[cfg(unix)]
            std::os::unix::fs::symlink(&*name, &link).with_context(|| format!("{} cannot be made", link.display()))?;
        }
    }
    Ok(())
}

/// A library with every name of the driver that its headers declare, good for linking and nothing else.
fn stand_in(include: &Path, stubs: &Path) -> Result<()> {
    let mut names = BTreeSet::new();
    for header in ["cuda.h", "cudaTypedefs.h"] {
        let path = include.join(header);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        names.extend(driver_names(&text));
    }
    let source = stubs.join("stub.c");
    let text: String = names.iter().map(|name| format!("void {name}(void) {{}}\n")).collect();
    fs::write(&source, text).with_context(|| format!("{} cannot be written", source.display()))?;
    let mut compile = Command::new("cc");
    compile
        .args(["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o"])
        .arg(stubs.join("libcuda.so"))
        .arg(source);
    succeed(&mut compile)
}

/// Words like `cuMemAlloc_v2`.
fn driver_names(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.strip_prefix("cu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase())))
        .map(String::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_driver_are_found_in_a_header() {
        let text = "#define cuMemAlloc cuMemAlloc_v2\nCUresult CUDAAPI cuInit(unsigned int Flags); cudaFree(p);";
        assert_eq!(driver_names(text).collect::<Vec<_>>(), ["cuMemAlloc", "cuMemAlloc_v2", "cuInit"]);
    }
}
