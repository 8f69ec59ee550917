//! Where pictures lie: a folder or a zip, listed once, then read one by one from any thread.
//!
//! Bytes from outside are untrusted: every file has a size limit, whatever its headers say.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use walkdir::{DirEntry, WalkDir};
use zip::ZipArchive;

use super::captions;
use crate::classes::listed;

/// More than any photo needs; a zip bomb wants more.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Endings of pictures that are read.
const READ: [&str; 20] = [
    "png", "apng", "jpg", "jpeg", "jpe", "jif", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff", "pbm", "pgm",
    "ppm", "pnm", "tga", "qoi", "ico",
];
/// Endings of pictures that are not, and are named for that: a set must not shrink in silence.
const NOT_READ: [&str; 31] = [
    "avif", "avifs", "heic", "heif", "hif", "jxl", "jp2", "j2k", "jpf", "jpx", "jxr", "svg", "svgz", "psd", "xcf",
    "exr", "hdr", "dds", "pcx", "eps", "cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf", "pef", "srw", "raw",
];
/// Enough of a file to tell what it is.
const HEAD: u64 = 32;

/// A folder or a zip, and the pictures in it, sorted by name.
pub struct Source {
    path: PathBuf,
    /// Names use `/` whatever the machine.
    names: Vec<String>,
    /// Files that may hold captions; they lie behind the pictures.
    texts: Vec<String>,
    store: Store,
    /// Files that are no pictures: how many of each ending.
    others: BTreeMap<String, usize>,
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
        if metadata.is_dir() { open_folder(path) } else { open_zip(path) }
    }

    /// The names of all pictures, sorted; at least one.
    pub fn pictures(&self) -> Result<Vec<String>> {
        let found = self.others().map_or("nothing".into(), |others| format!("only other files: {others}"));
        let expected = READ.join(", ");
        ensure!(
            !self.names.is_empty(),
            "{}: no pictures; expected {expected} files, found {found}",
            self.path.display()
        );
        Ok(self.names.clone())
    }

    /// Files that are no pictures, by ending; none where there are none.
    pub fn others(&self) -> Option<String> {
        let kinds: Vec<String> = self.others.iter().map(|(ending, n)| format!("{n} {ending}")).collect();
        (!kinds.is_empty()).then(|| listed(&kinds))
    }

    /// Names of the files that may hold captions.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The bytes of one of them, by its index.
    pub fn read_text(&self, index: usize) -> Result<Vec<u8>> {
        self.read(self.names.len() + index)
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

/// Every file under a folder. Links are followed, but for those that lead nowhere, or back to a folder above.
fn open_folder(root: &Path) -> Result<Source> {
    let mut files = Vec::new();
    let is_shown = |entry: &DirEntry| entry.depth() == 0 || !is_hidden(&entry.file_name().to_string_lossy());
    for entry in WalkDir::new(root).follow_links(true).into_iter().filter_entry(is_shown) {
        match entry {
            Ok(entry) if entry.file_type().is_file() => {
                let inside = entry.path().strip_prefix(root).expect("what lies in a folder begins with its path");
                let parts: Vec<_> = inside.iter().map(|part| part.to_string_lossy()).collect();
                files.push((parts.join("/"), entry.into_path()));
            }
            Ok(_) => {}
            Err(error) => {
                let leads_nowhere = error.path().is_some_and(|path| path.is_symlink() && !path.exists());
                if error.loop_ancestor().is_none() && !leads_nowhere {
                    return Err(error).with_context(|| format!("{}: cannot read the folder", root.display()));
                }
            }
        }
    }
    let head = |path: &PathBuf| -> Option<Vec<u8>> { head(File::open(path).ok()?) };
    let (names, texts, paths, others) = pick_pictures(files, head);
    Ok(Source { path: root.into(), names, texts, store: Store::Folder(paths), others })
}

fn open_zip(path: &Path) -> Result<Source> {
    let file = File::open(path).with_context(|| format!("{}: cannot open", path.display()))?;
    let n_bytes = file.metadata().with_context(|| format!("{}: cannot read", path.display()))?.len();
    let mut archive = ZipArchive::new(BufReader::new(file)).with_context(|| {
        format!("{}: expected a folder or a zip of pictures, found a file that is no zip", path.display())
    })?;
    let (mut files, mut n_claimed) = (Vec::new(), 0_u64);
    for index in 0..archive.len() {
        let entry = archive.by_index_data(index).with_context(|| format!("{}: entry {index}", path.display()))?;
        n_claimed = n_claimed.saturating_add(entry.compressed_size());
        if !entry.is_dir() {
            let name = String::from_utf8_lossy(entry.name_raw()).replace('\\', "/");
            let parts: Vec<&str> = name.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
            files.push((parts.join("/"), index));
        }
    }
    // Entries that share their bytes are how a small file claims to hold very much.
    ensure!(
        n_claimed <= n_bytes,
        "{}: its entries claim {n_claimed} bytes, the file has {n_bytes}: they overlap, as only a zip bomb's do",
        path.display()
    );
    let (names, texts, entries, others) = pick_pictures(files, |index| head(archive.by_index(*index).ok()?));
    Ok(Source { path: path.into(), names, texts, store: Store::Zip { archive: Mutex::new(archive), entries }, others })
}

/// Sorts by name and keeps pictures and what may hold captions: names of both, where they lie, in this order, and how many
/// others there are. A name says by its ending what it is; of one without an ending the content does, which `head` begins.
fn pick_pictures<T: Ord>(
    mut files: Vec<(String, T)>,
    mut head: impl FnMut(&T) -> Option<Vec<u8>>,
) -> (Vec<String>, Vec<String>, Vec<T>, BTreeMap<String, usize>) {
    files.retain(|(name, _)| !name.split('/').any(is_hidden));
    files.sort_unstable();
    let (mut names, mut places, mut others) = (Vec::new(), Vec::new(), BTreeMap::new());
    let (mut texts, mut places_of_texts) = (Vec::new(), Vec::new());
    for (name, place) in files {
        let is_picture = match ending(&name) {
            Some(ending) => READ.contains(&ending.as_str()) || never_read(&name),
            None => head(&place).is_some_and(|head| image::guess_format(&head).is_ok()),
        };
        if is_picture {
            names.push(name);
            places.push(place);
        } else {
            let kind = ending(&name).map_or("without an ending".into(), |ending| format!(".{ending}"));
            *others.entry(kind).or_default() += 1;
            if captions::may_hold(&name) {
                texts.push(name);
                places_of_texts.push(place);
            }
        }
    }
    places.extend(places_of_texts);
    (names, texts, places, others)
}

fn is_hidden(part: &str) -> bool {
    part.starts_with('.') || part == "__MACOSX"
}

/// A name's ending in small letters.
pub fn ending(name: &str) -> Option<String> {
    Path::new(name).extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase())
}

/// Whether a name is that of a picture of a kind that is not read.
pub fn never_read(name: &str) -> bool {
    ending(name).is_some_and(|ending| NOT_READ.contains(&ending.as_str()))
}

/// The first bytes of a file.
fn head(reader: impl Read) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(HEAD).read_to_end(&mut bytes).ok()?;
    Some(bytes)
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
