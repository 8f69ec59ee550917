//! Prompts by the line, and what networks are told of them.

mod states;
pub use states::{Known, Prompts};

use crate::output::say;
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;

/// Bytes of a file of prompts: ten million of ten words.
const BYTES: u64 = 512 << 20;

/// The lines of a text file in UTF-8, without white space around them. Empty lines are left out, and counted aloud.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let name = || path.display().to_string();
    let bytes = std::fs::metadata(path).with_context(name)?.len();
    ensure!(bytes <= BYTES, "{}: has {bytes} bytes, expected at most {BYTES}", name());
    let bytes = std::fs::read(path).with_context(name)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        anyhow::anyhow!("{}: line {line} is not UTF-8: save the file as UTF-8", name())
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if let Some(line) = text.lines().position(|line| line.contains('\0')) {
        bail!("{}: line {} holds a NUL, as no text does: save the file as UTF-8", name(), line + 1);
    }
    let prompts: Vec<String> =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_string).collect();
    ensure!(!prompts.is_empty(), "{}: holds no prompt, expected one a line", name());
    let empty = text.lines().count() - prompts.len();
    if empty > 0 {
        say(&format!("{}: {} prompts, {empty} empty lines left out", name(), prompts.len()));
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_prompt_but_empty_ones() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read = |bytes: &[u8]| {
            std::fs::write(file.path(), bytes).unwrap();
            read(file.path()).map_err(|error| error.to_string())
        };
        assert_eq!(read("\u{feff}a cat\r\n\n  naïve 猫 \n".as_bytes()).unwrap(), ["a cat", "naïve 猫"]);
        assert!(read(b"\n \n").unwrap_err().contains("holds no prompt, expected one a line"));
        assert!(read(b"one\ntwo \xff\n").unwrap_err().contains("line 2 is not UTF-8"));
        assert!(read(b"one\ntwo\0\n").unwrap_err().contains("line 2 holds a NUL"));
    }
}
