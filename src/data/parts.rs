//! `train/` beside `test/`: the parts that a set was divided into, which are no classes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};

/// What a folder calls itself, and the part that it is.
const PARTS: [(&str, &str); 13] = [
    ("train", "train"),
    ("training", "train"),
    ("trn", "train"),
    ("test", "test"),
    ("testing", "test"),
    ("tst", "test"),
    ("val", "val"),
    ("valid", "val"),
    ("validation", "val"),
    ("dev", "val"),
    ("eval", "val"),
    ("evaluation", "val"),
    ("holdout", "val"),
];
/// Words that may stand beside it: `train_images`, `test-set`.
const FILLERS: [&str; 9] = ["set", "images", "image", "imgs", "img", "data", "pictures", "pics", "split"];

/// Refuses classes that are parts of one set.
pub fn refuse(path: &Path, folders: &[&str]) -> Result<()> {
    let Some((one, other)) = two(folders.iter().copied()) else { return Ok(()) };
    let class = folders.iter().find(|folder| folder.split('/').any(|name| name == one)).unwrap_or(&one);
    let (path, unpack) = (path.display(), if path.is_dir() { "" } else { " of the unpacked zip" });
    bail!(
        "the folders {one} and {other} look like parts of one set, and {class} like no class: give one of them, as \
         {path}/{one}{unpack}, or pass --unconditional where it is offered, to take the pictures of both without classes"
    )
}

/// The same where folders are no classes: only said.
pub fn note(names: &[String], unconditional: bool) -> Option<String> {
    let folders = names.iter().filter_map(|name| Some(name.rsplit_once('/')?.0));
    let (one, other) = two(folders).filter(|_| unconditional)?;
    Some(format!("the pictures of {one} and {other} are taken together"))
}

/// Two folders that are different parts.
fn two<'a>(folders: impl Iterator<Item = &'a str>) -> Option<(&'a str, &'a str)> {
    let mut found: BTreeMap<&str, &str> = BTreeMap::new();
    for name in folders.flat_map(|folder| folder.split('/')) {
        if let Some(part) = part(name) {
            found.entry(part).or_insert(name);
        }
    }
    // The part to train on comes first where it is there.
    let mut parts = found.remove("train").into_iter().chain(found.into_values());
    parts.next().zip(parts.next())
}

/// `train2017`, `Train_Images`, `testset`.
fn part(name: &str) -> Option<&'static str> {
    let name = name.to_lowercase();
    let words = name.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty() && !FILLERS.contains(word));
    let words: Vec<&str> = words.map(|word| word.strip_suffix("set").unwrap_or(word)).collect();
    let [word] = words[..] else { return None };
    PARTS.iter().find(|(name, _)| *name == word).map(|(_, part)| *part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_set_are_told_from_classes() {
        let check = |folders: &[&str]| two(folders.iter().copied()).map(|(one, other)| format!("{one} {other}"));
        assert_eq!(check(&["test/a", "test/b", "train/a", "train/b"]), Some("train test".into()));
        assert_eq!(check(&["Train_Images", "Val2017"]), Some("Train_Images Val2017".into()));
        assert_eq!(check(&["cats/testset", "cats/trainset"]), Some("trainset testset".into()));
        // One part alone says nothing, nor do classes that have such a word among others.
        assert_eq!(check(&["train/a", "training/b", "cats"]), None);
        assert_eq!(check(&["crash test", "steam train", "valley", "trainers"]), None);
    }
}
