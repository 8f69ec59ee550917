//! Tables that a command keeps up to date within a page written by hand.

use anyhow::{Context, Result};
use dmd::aside::write_aside;
use std::io::Write;
use std::path::Path;

/// Replaces what stands between `<!-- table: NAME -->` and `<!-- end of table -->` in a page.
pub fn replace(page: &Path, name: &str, table: &str) -> Result<()> {
    let (begin, end) = (format!("<!-- table: {name} -->\n"), "<!-- end of table -->\n");
    let text = std::fs::read_to_string(page).with_context(|| page.display().to_string())?;
    let parts = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let (before, after) =
        parts.with_context(|| format!("{}: has no lines {begin:?} and {end:?} around a table", page.display()))?;
    write_aside(page, |file| Ok(write!(file, "{before}{begin}{table}{end}{after}")?))
}
