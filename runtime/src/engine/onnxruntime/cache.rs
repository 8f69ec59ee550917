//! What a provider compiled of a file, kept in a folder from one start to the next. An entry has the name of all that it was
//! made of, is written beside and renamed, and is passed over where it is damaged or of something else.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::Mmap;

use crate::contract::Source;

/// Before an entry: this, the hash of all that follows, the length of the key, the key, and what was compiled.
const MARK: &[u8; 16] = b"dmd-compiled 01\n";
const HEAD: usize = 16 + 16 + 8;

pub(super) struct Entry {
    path: PathBuf,
    key: String,
}

impl Entry {
    /// The place in a folder for what is compiled of a file, and of the weights beside it, by what `maker` says: a provider,
    /// its version, the library's, a device and options.
    pub fn of(folder: &Path, source: Source<'_>, beside: Option<&Path>, maker: &str) -> io::Result<Self> {
        let model = match source.bytes() {
            Some(bytes) => hash(bytes),
            None => hash_of_file(source.path())?,
        };
        let beside = beside.map(hash_of_file).transpose()?.unwrap_or_default();
        let key = format!("model {model:032x} {beside:032x} {maker}");
        Ok(Self { path: folder.join(format!("{:032x}.compiled", hash(key.as_bytes()))), key })
    }

    /// What was compiled, where it is whole and of this key.
    pub fn read(&self) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(&self.path).ok()?.read_to_end(&mut bytes).ok()?;
        let (head, rest) = bytes.split_at_checked(HEAD)?;
        let is_whole = head.starts_with(MARK) && head[16..32] == hash(&bytes[32..]).to_le_bytes();
        let n = usize::try_from(u64::from_le_bytes(head[32..].try_into().ok()?)).ok()?;
        let (key, compiled) = rest.split_at_checked(n)?;
        match is_whole && key == self.key.as_bytes() {
            true => Some(compiled.to_vec()),
            false => None,
        }
    }

    /// Puts it there, whole or not at all.
    pub fn write(&self, compiled: &[u8]) -> io::Result<()> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let rest = [&(self.key.len() as u64).to_le_bytes()[..], self.key.as_bytes(), compiled].concat();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let aside = self.path.with_extension(format!("part-{}-{number}", std::process::id()));
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let write = || {
            let mut file = File::create_new(&aside)?;
            [MARK, &hash(&rest).to_le_bytes()[..], &rest].iter().try_for_each(|part| file.write_all(part))?;
            file.sync_all()?;
            fs::rename(&aside, &self.path)
        };
        let written = write();
        // What processes left that were ended while they wrote; another that is writing loses nothing but its copy.
        self.parts().into_iter().for_each(|part| _ = fs::remove_file(part));
        written
    }

    fn parts(&self) -> Vec<PathBuf> {
        let stem = self.path.file_stem().map(|stem| format!("{}.part-", stem.to_string_lossy())).unwrap_or_default();
        let entries = self.path.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&stem))
            .map(|entry| entry.path())
            .collect()
    }
}

fn hash_of_file(path: &Path) -> io::Result<u128> {
    // SAFETY: the map lives for this line; a file that is written to meanwhile has another hash, which names no entry. One
    // that is made shorter meanwhile would end the process, as it does where ONNX Runtime maps weights itself.
    Ok(hash(&unsafe { Mmap::map(&File::open(path)?) }?))
}

/// Fowler, Noll and Vo's hash of 128 bits (FNV-1a), by words of eight bytes and the length: the same on every machine. It
/// tells damage and other files, and keeps out nobody who may write to the folder.
fn hash(bytes: &[u8]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let words = words.iter().chain([&last]).map(|word| u64::from_le_bytes(*word));
    words.chain([bytes.len() as u64]).fold(BASIS, |hash, word| (hash ^ u128::from(word)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    const FOLDER: &str = "DMD_TEST_CACHE";

    fn entry(folder: &Path, maker: &str) -> Entry {
        Entry::of(folder, Source::Bytes(b"a model"), None, maker).unwrap()
    }

    #[test]
    fn an_entry_comes_back_and_a_damaged_or_foreign_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let [entry, other] = ["QNN 2.7.0", "QNN 2.8.0"].map(|maker| entry(folder.path(), maker));
        assert!(entry.read().is_none() && entry.path != other.path);
        entry.write(b"compiled").unwrap();
        assert_eq!(entry.read().unwrap(), b"compiled");
        let whole = fs::read(&entry.path).unwrap();
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] ^= 1;
            fs::write(&entry.path, &broken).unwrap();
            assert!(entry.read().is_none(), "byte {at}");
            fs::write(&entry.path, &whole[..at]).unwrap();
            assert!(entry.read().is_none(), "cut at {at}");
        }
        fs::write(&other.path, &whole).unwrap();
        assert!(other.read().is_none());
    }

    /// The child of the next test: writes entries until it is killed.
    #[test]
    fn writes_until_it_is_killed() {
        let Some(folder) = std::env::var_os(FOLDER) else { return };
        let folder = Path::new(&folder);
        let entry = entry(folder, "");
        fs::write(folder.join("begun"), "").unwrap();
        loop {
            entry.write(&[7; 1 << 16]).unwrap();
        }
    }

    #[test]
    fn an_entry_is_whole_or_absent_however_often_its_writer_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let entry = entry(folder.path(), "");
        let (mut found, mut left_behind) = (0, 0);
        for i in 0..200u64 {
            if i % 4 == 0 {
                _ = fs::remove_file(&entry.path);
            }
            let name = "engine::onnxruntime::cache::tests::writes_until_it_is_killed";
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", name]).env(FOLDER, folder.path()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = child.spawn().unwrap();
            // However long a process takes to start on a machine that others load.
            while fs::remove_file(folder.path().join("begun")).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(97 * (i % 50)));
            child.kill().unwrap();
            child.wait().unwrap();
            left_behind += entry.parts().len();
            if let Some(compiled) = entry.read() {
                assert_eq!(compiled, [7; 1 << 16]);
                found += 1;
            }
        }
        assert!(found > 0 && left_behind > 0, "{found} whole entries, {left_behind} parts: nothing was interrupted");
        entry.write(b"the last word").unwrap();
        assert_eq!((entry.read().unwrap().as_slice(), entry.parts().len()), (&b"the last word"[..], 0));
    }
}
