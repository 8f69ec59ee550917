//! What the tests of the whole path share: a scratch folder that `dmd` runs in, with little pictures and models in it.
#![allow(dead_code)] // every test file takes what it needs

use ndarray::Array4;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A scratch folder; every command line runs in it, so that paths are plain names.
pub struct Workplace {
    folder: tempfile::TempDir,
}

impl Workplace {
    /// An empty one.
    pub fn new() -> Self {
        Workplace { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn npy(&self, name: &str) -> Array4<f32> {
        dmd::npy::read(&self.path(name), |_| Ok(())).unwrap()
    }

    /// 24 pictures of 8x8 in `pictures/blue` and `pictures/red`, and a network for them in `unet.json`.
    pub fn with_pictures(self) -> Self {
        for i in 0..24u8 {
            let [class, red, blue] = if i < 12 { ["blue", "", "b"] } else { ["red", "r", ""] };
            let colour = |on: &str, x: u32| if on.is_empty() { 10 * i } else { 200 + (x as u8) };
            let picture =
                image::RgbImage::from_fn(8, 8, |x, y| image::Rgb([colour(red, x), (y * 30) as u8, colour(blue, x)]));
            let path = self.path(&format!("pictures/{class}/{i}.png"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            picture.save(path).unwrap();
        }
        self.write("unet.json", TINY_UNET);
        self
    }

    /// A teacher that diffusers wrote: `ddpm-tiny` (epsilon, unconditional) or `edm-tiny` (three classes); 8x8, RGB.
    pub fn with_fixture(self, name: &str) -> Self {
        self.with_fixture_at(name, "teacher")
    }

    /// A fixture of `dmd-models` under another name.
    pub fn with_fixture_at(self, name: &str, to: &str) -> Self {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures").join(name);
        copy_folder(&from, &self.path(to));
        self
    }

    pub fn copy(&self, from: &str, to: &str) {
        copy_folder(&self.path(from), &self.path(to));
    }

    /// Changes a JSON file.
    pub fn edit_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_str(&self.text(name)).unwrap();
        change(&mut value);
        self.write(name, value.to_string());
    }

    /// `dmd` with the words of this line, on one thread.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dmd"));
        command.current_dir(self.folder.path()).args(["--threads", "1"]).args(line.split_whitespace());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Runs a line that must succeed, with `--json`: one object on stdout and nothing else.
    pub fn ok(&self, line: &str) -> Value {
        let output = self.run(&format!("--json {line}"));
        assert!(output.status.success(), "dmd {line}: {}", stderr(&output));
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert_eq!(stdout.lines().count(), 1, "dmd {line}: {stdout}");
        let value: Value = serde_json::from_str(&stdout).unwrap();
        assert!(value.is_object(), "dmd {line}: {stdout}");
        value
    }

    /// Runs a line that must fail with this exit code and with all of these parts in its message, and that must leave
    /// the folder exactly as it was. Returns the message.
    pub fn refuses(&self, line: &str, code: i32, parts: &[&str]) -> String {
        let before = self.snapshot("");
        let message = self.fails(line, code, parts);
        let after = self.snapshot("");
        let names = |s: &BTreeMap<PathBuf, Vec<u8>>| s.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&after), names(&before), "dmd {line} left something or took something away");
        assert!(after == before, "dmd {line} changed a file");
        message
    }

    /// The same without a look at the folder.
    pub fn fails(&self, line: &str, code: i32, parts: &[&str]) -> String {
        check_failure(line, &self.run(line), code, parts)
    }

    /// All files and folders under a folder, with their bytes.
    pub fn snapshot(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let root = self.path(name);
        let mut found = BTreeMap::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
                let bytes = if path.is_dir() { Vec::new() } else { fs::read(&path).unwrap() };
                found.insert(path.strip_prefix(&root).unwrap().to_path_buf(), bytes);
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        found
    }
}

/// Takes out the time that lines and checkpoints took, which no two runs share.
pub fn without_times_in(files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for (path, bytes) in files {
        if path.ends_with("metrics.jsonl") || path.ends_with("state.json") {
            *bytes = without_times(&String::from_utf8(bytes.clone()).unwrap()).into();
        }
    }
}

pub fn without_times(metrics: &str) -> String {
    let line = |line| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value.as_object_mut().unwrap().remove("elapsed_s");
        format!("{value}\n")
    };
    metrics.lines().map(line).collect()
}

/// A command that failed as it should.
pub fn check_failure(line: &str, output: &Output, code: i32, parts: &[&str]) -> String {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(code), "dmd {line}: {message}");
    assert!(!message.contains("panicked"), "dmd {line}: {message}");
    for part in parts {
        assert!(message.contains(part), "dmd {line}: {message:?} lacks {part:?}");
    }
    message
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// max|a − b|.
pub fn max_difference(a: &Array4<f32>, b: &Array4<f32>) -> f32 {
    assert_eq!(a.dim(), b.dim());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::write(target, fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

/// Two levels of eight channels: some twelve thousand weights.
pub const TINY_UNET: &str = r#"{
  "_class_name": "UNet2DModel",
  "sample_size": 8,
  "in_channels": 3,
  "out_channels": 3,
  "block_out_channels": [8, 8],
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
  "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
  "layers_per_block": 1,
  "attention_head_dim": 8,
  "norm_num_groups": 4
}"#;
