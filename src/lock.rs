//! One process per folder: whoever writes a run, a teacher or pairs holds its lock. It is the system's own lock on a
//! file, which ends with its process however that ends; the text in the file says whose it is.

use crate::output;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The file's name in the folder that it is for. It stays there, empty: removing it would let two processes lock two
/// files of the same name.
pub const NAME: &str = ".lock";

/// A folder that is this process's, until it is dropped.
pub struct Lock(File);

impl Lock {
    /// Takes a folder, which must exist; one that another process holds is refused, and left untouched.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(NAME);
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = open().with_context(|| format!("{}: cannot be written", path.display()))?;
        // Between taking the lock and writing who took it, and where a locked file cannot be read, there is no text.
        let mut text = String::new();
        let holder = file.read_to_string(&mut text).ok().and_then(|_| serde_json::from_str::<Holder>(&text).ok());
        let in_use = |remedy: &str| {
            let holder = holder.as_ref().map_or("another process".into(), Holder::to_string);
            anyhow::anyhow!("{}: in use by {holder}; {remedy}", folder.display())
        };
        match (file.try_lock(), &holder) {
            (Ok(()), Some(holder)) if holder.host != host() => {
                output::warn(&format!("{}: was left by {holder}, whose lock is free; going on here", folder.display()));
            }
            (Ok(()), _) => {}
            (Err(TryLockError::WouldBlock), _) => return Err(in_use("wait for it or stop it, or give another --out")),
            // A file system without locks: the text must do.
            (Err(TryLockError::Error(_)), None) => {}
            (Err(TryLockError::Error(_)), Some(holder)) => match holder.runs() {
                Some(false) => {}
                Some(true) => return Err(in_use("wait for it or stop it, or give another --out")),
                None => bail!(in_use(&format!("if that has ended, remove {}", path.display()))),
            },
        }
        let write = || -> std::io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(serde_json::to_string(&Holder::this())?.as_bytes())
        };
        // Where even this line has no room, the lock holds without it.
        _ = { write }();
        Ok(Lock(file))
    }
}

/// Whether there is nothing in a folder yet, but for a lock; a file is no folder.
pub fn is_free(folder: &Path) -> Result<bool> {
    let in_the_way = |entry: std::fs::DirEntry| entry.file_name() != NAME;
    Ok(!folder.exists() || (folder.is_dir() && !folder.read_dir()?.flatten().any(in_the_way)))
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The lock goes with the file; what cannot be emptied is found stale.
        _ = self.0.set_len(0);
    }
}

/// The process that holds a lock.
#[derive(Serialize, Deserialize)]
struct Holder {
    pid: u32,
    host: String,
    /// When it took the lock, seconds since 1970.
    since: u64,
    /// When it began, as the system counts: another process of the same number began at another time.
    began: Option<u64>,
}

impl Holder {
    fn this() -> Self {
        let pid = std::process::id();
        Holder { pid, host: host(), since: now(), began: began(pid) }
    }

    /// Whether it still runs; none where that cannot be told from here.
    fn runs(&self) -> Option<bool> {
        let told = self.host == host() && self.began.is_some();
        told.then(|| began(self.pid) == self.began)
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let minutes = now().saturating_sub(self.since) / 60;
        write!(f, "process {} on {}, which began {minutes} minutes ago", self.pid, self.host)
    }
}

/// This machine's name.
fn host() -> String {
    #[cfg(unix)]
    {
        let mut name = [0u8; 256];
        // SAFETY: it writes at most as many bytes as it is told, and the last is left zero.
        unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
        name.split(|byte| *byte == 0).next().map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default()
    }
    #[cfg(not(unix))]
    std::env::var("COMPUTERNAME").unwrap_or_default()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// When a process began, in ticks since the machine did (Linux); none where there is no such process.
fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything; the 22nd field is the 20th behind it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_by_the_name_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join(NAME)).unwrap();
        let error = Lock::take(folder.path()).err().unwrap().to_string();
        assert!(error.contains(&format!("in use by process {} on {}", std::process::id(), host())), "{error}");
        assert_eq!(std::fs::read_to_string(folder.path().join(NAME)).unwrap(), text);
        drop(first);
        assert_eq!(std::fs::read_to_string(folder.path().join(NAME)).unwrap(), "");
        Lock::take(folder.path()).unwrap();
    }

    /// What a killed process leaves: by its own number, by that of a process that began later, on another machine.
    #[test]
    fn the_text_of_a_process_that_is_no_more_stands_in_nobodys_way() {
        let folder = tempfile::tempdir().unwrap();
        let own = Holder::this();
        for (pid, host, began) in [
            (u32::MAX, host(), Some(1)),
            (own.pid, host(), own.began.map(|began| began + 1)),
            (1, "other".into(), None),
        ] {
            let left = serde_json::to_string(&Holder { pid, host, since: 0, began }).unwrap();
            std::fs::write(folder.path().join(NAME), left).unwrap();
            Lock::take(folder.path()).unwrap();
        }
        std::fs::write(folder.path().join(NAME), "no JSON").unwrap();
        Lock::take(folder.path()).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn without_a_systems_lock_a_process_is_known_by_its_beginning() {
        let own = Holder::this();
        assert_eq!(own.runs(), Some(true));
        assert_eq!(Holder { began: own.began.map(|began| began + 1), ..Holder::this() }.runs(), Some(false));
        assert_eq!(Holder { pid: u32::MAX, ..Holder::this() }.runs(), Some(false));
        assert_eq!(Holder { host: "other".into(), ..Holder::this() }.runs(), None);
    }
}
