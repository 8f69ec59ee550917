//! Where pictures lie: a folder or a zip, listed once, then read one by one from any thread.
//!
//! Bytes from outside are untrusted: every file has a size limit, whatever its headers say.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use zip::ZipArchive;

/// More than any photo needs; a zip bomb wants more.
const MAX_FILE_BYTES: u64 = 256 << 20;
const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "gif", "bmp"];

/// A folder or a zip, and the pictures in it, sorted by name.
pub struct Source {
    path: PathBuf,
    /// Names use `/` whatever the machine.
    names: Vec<String>,
    store: Store,
    /// A file that is no picture, for the message when nothing else is there.
    other: Option<String>,
}

enum Store {
    Folder(Vec<PathBuf>),
    /// Reading is a small part of the work beside decoding, so threads take turns at it.
    Zip {
        archive: Mutex<ZipArchive<BufReader<File>>>,
        entries: Vec<usize>,
    },
}

impl Source {
    /// Lists a folder or a zip.
    pub fn open(path: &Path) -> Result<Source> {
        let metadata = fs::metadata(path).with_context(|| format!("{}: cannot read", path.display()))?;
        let mut source = if metadata.is_dir() { open_folder(path)? } else { open_zip(path)? };
        source.path = path.to_owned();
        Ok(source)
    }

    /// The names of all pictures, sorted; at least one.
    pub fn pictures(&self) -> Result<Vec<String>> {
        let found = match &self.other {
            Some(other) => format!("only other files, such as {other}"),
            None => "nothing".to_owned(),
        };
        let expected = EXTENSIONS.join(", ");
        ensure!(
            !self.names.is_empty(),
            "{}: no pictures; expected {expected} files, found {found}",
            self.path.display()
        );
        Ok(self.names.clone())
    }

    /// The bytes of a picture, by its index in `pictures()`.
    pub fn read(&self, index: usize) -> Result<Vec<u8>> {
        match &self.store {
            Store::Folder(paths) => read_limited(File::open(&paths[index])?, MAX_FILE_BYTES),
            Store::Zip { archive, entries } => {
                let mut archive = archive.lock().expect("no thread panics while it reads from the zip");
                read_limited(archive.by_index(entries[index])?, MAX_FILE_BYTES)
            }
        }
    }
}

fn open_folder(root: &Path) -> Result<Source> {
    let mut files = Vec::new();
    walk(root, "", &mut vec![canonical(root)?], &mut files)?;
    let (names, paths, other) = pick_pictures(files);
    Ok(Source { path: PathBuf::new(), names, store: Store::Folder(paths), other })
}

/// Adds every file under `folder`. `above` holds the folders on the way here, because a link may lead back to one.
fn walk(folder: &Path, prefix: &str, above: &mut Vec<PathBuf>, files: &mut Vec<(String, PathBuf)>) -> Result<()> {
    let cannot_read = || format!("{}: cannot read the folder", folder.display());
    for entry in fs::read_dir(folder).with_context(cannot_read)? {
        let entry = entry.with_context(cannot_read)?;
        let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        // A link that leads nowhere is like a file that is no picture.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_dir() && !is_hidden(&name) {
            let target = canonical(&path)?;
            if !above.contains(&target) {
                above.push(target);
                walk(&path, &format!("{prefix}{name}/"), above, files)?;
                above.pop();
            }
        } else if metadata.is_file() {
            files.push((format!("{prefix}{name}"), path));
        }
    }
    Ok(())
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().with_context(|| format!("{}: cannot read the folder", path.display()))
}

fn open_zip(path: &Path) -> Result<Source> {
    let file = File::open(path).with_context(|| format!("{}: cannot open", path.display()))?;
    let archive = ZipArchive::new(BufReader::new(file)).with_context(|| {
        format!("{}: expected a folder or a zip of pictures, found a file that is no zip", path.display())
    })?;
    let mut files = Vec::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_data(index).with_context(|| format!("{}: entry {index}", path.display()))?;
        if !entry.is_dir() {
            let name = String::from_utf8_lossy(entry.name_raw()).replace('\\', "/");
            let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
            files.push((parts.join("/"), index));
        }
    }
    let (names, entries, other) = pick_pictures(files);
    Ok(Source { path: PathBuf::new(), names, store: Store::Zip { archive: Mutex::new(archive), entries }, other })
}

/// Sorts by name and keeps pictures: their names, where they lie, and one file that is none.
fn pick_pictures<T: Ord>(mut files: Vec<(String, T)>) -> (Vec<String>, Vec<T>, Option<String>) {
    files.retain(|(name, _)| !name.split('/').any(is_hidden));
    files.sort_unstable();
    let (pictures, others): (Vec<_>, Vec<_>) = files.into_iter().partition(|(name, _)| has_picture_extension(name));
    let (names, places) = pictures.into_iter().unzip();
    (names, places, others.into_iter().next().map(|(name, _)| name))
}

fn is_hidden(part: &str) -> bool {
    part.starts_with('.') || part == "__MACOSX"
}

fn has_picture_extension(name: &str) -> bool {
    let extension = Path::new(name).extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

/// Reads to the end, but never more than `limit` bytes, so that a lying header costs nothing.
fn read_limited(reader: impl io::Read, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        bail!("the file is larger than {} MiB", limit >> 20);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_limit() {
        assert_eq!(read_limited(&[7_u8; 16][..], 16).unwrap(), [7; 16]);
        assert!(read_limited(io::repeat(0), 1 << 20).unwrap_err().to_string().contains("larger than 1 MiB"));
    }
}
