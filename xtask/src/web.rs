//! `cargo xtask web-test`: examples/web in a headless Chromium, against the pictures that the built `dmd` makes.
//!
//! Not part of `cargo xtask test`, because it fetches packages with npm. What is compared is in
//! examples/web/test/browser.test.mjs; here its folder is prepared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};

use crate::chores;
use crate::setup;
use crate::venv::succeed;

/// The oldest Node that the example and its packages run on.
const NODE: (u32, u32) = (20, 11);

/// How the folder is filled, line by line. Two steps: the pictures need not be good, only the same.
const PREPARE: [&str; 11] = [
    "distill --teacher TEACHER --out run --steps 2 --batch 4 --device cpu --force",
    "export run/generator --onnx f32.onnx --force",
    "export run/generator --onnx u8.onnx --output u8 --batch 2 --force",
    "export run/generator --onnx external.onnx --external-data --force",
    "sample f32.onnx --npy f32-7.npy -n 16 --seed 7 --force",
    "sample f32.onnx --npy f32-8.npy -n 16 --seed 8 --force",
    "sample f32.onnx --npy f32-7-class.npy -n 16 --seed 7 --class 1 --force",
    "sample u8.onnx --npy u8-7.npy -n 16 --seed 7 --force",
    "distill --teacher TEACHER --out run-steps --steps 2 --batch 4 --device cpu --force --set generator.steps=[10,2.5,0.5]",
    "export run-steps/generator --onnx steps.onnx --force",
    "sample steps.onnx --npy steps-7.npy -n 16 --seed 7 --force",
];

/// Fetches what the test needs beside the program.
pub fn fetch() -> Result<ExitCode> {
    node_is_here().map_err(anyhow::Error::msg)?;
    install(&example()).map(|()| ExitCode::SUCCESS)
}

pub fn test() -> Result<ExitCode> {
    if let Err(reason) = node_is_here() {
        eprintln!("web-test: SKIPPED; {reason}");
        return Ok(ExitCode::SUCCESS);
    }
    let example = example();
    let environment = setup::everything()?;
    let program = chores::built_dmd(&environment, &[])?;
    let folder = program.parent().and_then(Path::parent).context("dmd lies in no target folder")?.join("web-test");
    fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let teacher = setup::root().join("models").join("pretrained").join("emoji-16");
    for line in PREPARE {
        let words =
            line.split_whitespace().map(|word| if word == "TEACHER" { teacher.as_os_str() } else { word.as_ref() });
        succeed(environment.command(&program).args(words).current_dir(&folder))?;
    }
    install(&example)?;
    let tests = ["--test", "--test-reporter=spec", "test/unit.test.mjs", "test/browser.test.mjs"];
    succeed(Command::new("node").args(tests).current_dir(&example).env("DMD_WEB_TEST", &folder))?;
    eprintln!("web-test: passed; the page as Chromium drew it: {}", folder.join("page.png").display());
    Ok(ExitCode::SUCCESS)
}

fn example() -> PathBuf {
    setup::root().join("examples").join("web")
}

/// Or why the test cannot run here.
pub fn node_is_here() -> Result<(), String> {
    let remedy = format!("install Node {}.{} or newer, with npm", NODE.0, NODE.1);
    let version_of = |program: &str| {
        let output = npm_or_node(program).arg("--version").stdin(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let version = version_of("node").ok_or_else(|| format!("node is not installed: {remedy}"))?;
    if node_version(&version).is_none_or(|found| found < NODE) {
        return Err(format!("node is {version}: {remedy}"));
    }
    version_of("npm").map(drop).ok_or_else(|| format!("npm is not installed: {remedy}"))
}

/// `v20.20.2`: the first two numbers.
fn node_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix('v')?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// The packages that package-lock.json names, unless they are here already.
fn install(example: &Path) -> Result<()> {
    let changed = |name: &str| fs::metadata(example.join(name)).and_then(|about| about.modified()).ok();
    if changed("node_modules/.package-lock.json") >= changed("package-lock.json") {
        return Ok(());
    }
    eprintln!("web-test: fetching onnxruntime-web and Chromium with npm (220 MB on disk)");
    let arguments = ["ci", "--no-audit", "--no-fund", "--ignore-scripts"];
    succeed(npm_or_node("npm").args(arguments).current_dir(example)).context("npm could not fetch the packages")
}

/// npm is a script, which Windows starts only under its full name.
pub fn npm_or_node(program: &str) -> Command {
    Command::new(if cfg!(windows) && program == "npm" { "npm.cmd" } else { program })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_node_are_read() {
        assert_eq!(node_version("v20.20.2"), Some((20, 20)));
        assert!(node_version("v18.19.1").unwrap() < NODE && node_version("v22.0.0").unwrap() > NODE);
        assert_eq!(node_version("20"), None);
        assert_eq!(node_version(""), None);
    }
}
