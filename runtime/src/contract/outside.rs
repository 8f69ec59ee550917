//! Weights outside the file: in one file beside it, and nowhere else. An engine would follow any path that it is given,
//! absolute, upwards, by a link, or into the process's own memory.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::graph::Model;

/// The file that holds them, links resolved, after a check that it lies beside the model and has all that the model asks
/// for. `path` is the model's, `None` where there is none.
pub(super) fn locate(path: Option<&Path>, model: &Model) -> Result<Option<PathBuf>, String> {
    let names: BTreeSet<&str> = model.outside().map(|(_, part)| part.location.as_str()).collect();
    let Some(name) = names.first().copied() else { return Ok(None) };
    if names.len() > 1 || !is_plain(name) {
        return Err(format!("its weights lie in {names:?}, expected one file beside it"));
    }
    let Some(path) = path else {
        return Err(format!("its weights lie in {name:?}: a model without a path has them all in itself"));
    };
    let beside = path.with_file_name(name);
    let failed = |error: std::io::Error| format!("its weights, {}: {error}", beside.display());
    let data = beside.canonicalize().map_err(failed)?;
    if !is_beside(path, &data).map_err(failed)? {
        return Err(format!(
            "its weights, {}, are a link to {}, which lies neither beside the model nor beside what the model links to",
            beside.display(),
            data.display()
        ));
    }
    let about = fs::metadata(&data).map_err(failed)?;
    if !about.is_file() {
        return Err(format!("its weights, {}, are no file", beside.display()));
    }
    check_parts(model, &beside, about.len())?;
    Ok(Some(data))
}

/// A name without a folder on any system, and no address.
fn is_plain(name: &str) -> bool {
    Path::new(name).file_name() == Some(name.as_ref()) && !name.contains(['/', '\\', ':', '*', '\0'])
}

/// Hugging Face's cache keeps model and data as links into one folder: then the data lies beside what the model links to.
fn is_beside(path: &Path, data: &Path) -> std::io::Result<bool> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let model = path.canonicalize()?;
    Ok(data.parent() == Some(folder.canonicalize()?.as_path()) || data.parent() == model.parent())
}

/// Every part lies in the file, and no byte is asked for twice: a small file must not become a large model.
fn check_parts(model: &Model, data: &Path, bytes: u64) -> Result<(), String> {
    let data = data.display();
    let mut all = 0u64;
    for (constant, part) in model.outside() {
        let needed = constant.bytes().unwrap_or(u64::MAX);
        if part.offset.checked_add(needed).is_none_or(|end| end > bytes) {
            let (name, offset) = (&constant.name, part.offset);
            return Err(format!(
                "constant {name:?}, {needed} bytes at {offset}, lies beyond the end of {data}, which has {bytes}"
            ));
        }
        all = all.saturating_add(needed);
    }
    match all > bytes {
        true => Err(format!("{all} bytes are asked for, of the {bytes} that {data} has")),
        false => Ok(()),
    }
}
