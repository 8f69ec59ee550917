//! A file appears under its name whole or not at all: it is written beside, then renamed.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};

/// Writes `path` through `fill`. Where anything fails, what was at `path` before is still there and nothing else is left.
pub fn write_aside(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let name = path.file_name().with_context(|| format!("{}: names no file", path.display()))?;
    let aside = path.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
    let write = || -> Result<()> {
        let mut file = BufWriter::new(File::create(&aside)?);
        fill(&mut file)?;
        file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
        Ok(fs::rename(&aside, path)?)
    };
    write().map_err(|error| {
        // Best effort: the first error is the one to tell.
        let _ = fs::remove_file(&aside);
        error.context(format!("{}: cannot write", path.display()))
    })
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
}
