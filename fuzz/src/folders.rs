//! Readers of paths, given bytes.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use dmd_models::ModelFolder;
use tempfile::TempDir;

/// Loads the tiny model folder with one of its files replaced.
pub fn load_folder(file: &str, bytes: &[u8]) {
    with_replaced("edm-tiny", file, bytes, |folder| drop(ModelFolder::load(folder, &Device::Cpu)));
}

/// Calls a reader of folders on a copy of this fixture of dmd-models with one of its files replaced.
pub fn with_replaced(fixture: &str, file: &str, bytes: &[u8], read: impl FnOnce(&Path)) {
    thread_local! {
        static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
    }
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| {
            let folder = tempfile::tempdir().expect("a folder for temporary files");
            let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures");
            copy(&fixtures.join(fixture), folder.path());
            folder
        });
        fs::write(folder.path().join(file), bytes).expect("room for temporary files");
        read(folder.path());
    });
}

/// Calls a reader of files on these bytes under this name.
pub fn with_file(name: &str, bytes: &[u8], read: impl FnOnce(&Path)) {
    thread_local! {
        static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
    }
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| tempfile::tempdir().expect("a folder for temporary files"));
        let path: PathBuf = folder.path().join(name);
        fs::write(&path, bytes).expect("room for temporary files");
        read(&path);
    });
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("the fixture is there").flatten() {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            fs::create_dir_all(&to).expect("room for temporary files");
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).expect("room for temporary files");
        }
    }
}
