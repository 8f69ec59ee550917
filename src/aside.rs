//! A file appears under its name whole or not at all: it is written beside, then renamed.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Writes `path` through `fill`. Where anything fails, what was at `path` before is still there and nothing else is left.
pub fn write_aside(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    Aside::write(path, fill)?.rename()
}

/// A file that is there whole, but not under its name yet; removed where it does not get it. Of several that belong
/// together, none gets its name before all are written.
pub struct Aside {
    path: PathBuf,
    aside: PathBuf,
}

impl Aside {
    /// Writes what will be `path`.
    pub fn write(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<Self> {
        let name = path.file_name().with_context(|| format!("{}: names no file", path.display()))?;
        ensure!(!path.is_dir(), "{}: cannot write: it is a folder, expected a file name", path.display());
        let aside = path.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
        let aside = Aside { path: path.into(), aside };
        let write = || -> Result<()> {
            let mut file = BufWriter::new(File::create(&aside.aside)?);
            fill(&mut file)?;
            Ok(file.into_inner().map_err(|error| error.into_error())?.sync_all()?)
        };
        write().with_context(|| format!("{}: cannot write", path.display()))?;
        Ok(aside)
    }

    /// Gives it its name.
    pub fn rename(self) -> Result<()> {
        fs::rename(&self.aside, &self.path).with_context(|| format!("{}: cannot write", self.path.display()))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove; else the first error is the one to tell.
        _ = fs::remove_file(&self.aside);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        write_aside(&path, |file| Ok(file.write_all(b"old")?)).unwrap();
        let error = write_aside(&path, |file| {
            file.write_all(b"new")?;
            anyhow::bail!("the disk is full")
        });
        assert!(format!("{:#}", error.unwrap_err()).ends_with("a.txt: cannot write: the disk is full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn of_files_that_belong_together_none_is_there_where_one_cannot_be() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["a.json", "a.html"].map(|name| folder.path().join(name));
        fs::create_dir(&second).unwrap();
        let write = || -> Result<()> {
            let both = [&first, &second].map(|path| Aside::write(path, |file| Ok(file.write_all(b"half")?)));
            both.into_iter().collect::<Result<Vec<_>>>()?.into_iter().try_for_each(Aside::rename)
        };
        assert!(
            format!("{:#}", write().unwrap_err())
                .ends_with("a.html: cannot write: it is a folder, expected a file name")
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        fs::remove_dir(&second).unwrap();
        write().unwrap();
        assert_eq!([first, second].map(|path| fs::read(path).unwrap()), [b"half"; 2]);
    }
}
