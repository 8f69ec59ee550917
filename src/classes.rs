//! Classes by name: found in one place, and listed so that a thousand of them leave a message readable.

use anyhow::{Result, bail, ensure};
use dmd_runtime::printable;
use std::borrow::Cow;

/// Names in a message before the rest is counted.
const LISTED: usize = 10;

/// `a, b, c`, of more than ten the first and how many there are besides; names from files are made harmless.
pub fn listed<S: AsRef<str>>(names: &[S]) -> String {
    let shown: Vec<Cow<str>> = names.iter().take(LISTED).map(|name| printable(name.as_ref())).collect();
    match names.len().saturating_sub(LISTED) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// The label of a class given by name or index; `option` is where it was given.
pub fn label(option: &str, class: &str, classes: &[String]) -> Result<usize> {
    ensure!(!classes.is_empty(), "{option} {class}: the model has no classes");
    let by_name = classes.iter().position(|name| name == class);
    // Some have several names, as those of ImageNet: "tench, Tinca tinca".
    let one_of = |name: &String| name.split(',').any(|name| name.trim() == class);
    match by_name
        .or_else(|| classes.iter().position(one_of))
        .or_else(|| class.parse().ok().filter(|index| *index < classes.len()))
    {
        Some(label) => Ok(label),
        None => {
            bail!("{option} {class}: no such class, the model has {} (0 to {})", listed(classes), classes.len() - 1)
        }
    }
}

/// Whether a model's classes have numbers in the place of names, as those of other tools' models do.
pub fn nameless(classes: &[String]) -> bool {
    classes.iter().enumerate().all(|(i, name)| *name == i.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_go_by_name_or_index() {
        let classes = ["cat".to_string(), "dog".to_string()];
        assert_eq!(["dog", "0"].map(|class| label("--class", class, &classes).unwrap()), [1, 0]);
        let of_imagenet = ["tench, Tinca tinca", "crane", "Tinca tinca"].map(String::from);
        let found = ["tench", "Tinca tinca", "tench, Tinca tinca"].map(|class| label("--class", class, &of_imagenet));
        assert_eq!(found.map(Result::unwrap), [0, 2, 0]);
        let error = |class, classes: &[String]| label("--class", class, classes).unwrap_err().to_string();
        assert_eq!(error("fox", &classes), "--class fox: no such class, the model has cat, dog (0 to 1)");
        assert!(error("2", &classes).contains("no such class"));
        assert_eq!(error("cat", &[]), "--class cat: the model has no classes");
        let many: Vec<String> = (0..1000).map(|i| i.to_string()).collect();
        assert!(nameless(&many) && !nameless(&classes));
        assert_eq!(
            error("fox", &many),
            "--class fox: no such class, the model has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 990 more (0 to 999)"
        );
    }
}
