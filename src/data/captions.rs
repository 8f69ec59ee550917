//! Captions of pictures: `captions.jsonl`, `metadata.jsonl` and `metadata.csv` as in Hugging Face's imagefolder, or a `.txt`
//! beside each picture, of the same name. The first kind that there is counts.

use super::source::Source;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Lists of captions, by file name.
const LISTS: [&str; 3] = ["captions.jsonl", "metadata.jsonl", "metadata.csv"];
/// What a list calls a picture, and its caption or captions.
const FILE: [&str; 3] = ["file_name", "file", "image"];
const TEXT: [&str; 5] = ["text", "caption", "captions", "prompt", "prompts"];

/// Whether a file of this name may hold captions.
pub fn may_hold(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    LISTS.contains(&&*file) || file.ends_with(".txt")
}

/// The captions of each of these pictures; none where a picture has none. A list that names a picture that is not there is
/// refused.
pub fn of(path: &Path, source: &Source, names: &[String]) -> Result<Vec<Vec<String>>> {
    let numbers: BTreeMap<&str, usize> = names.iter().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
    let texts = source.texts();
    let file_of = |name: &str| name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    let mut captions = vec![Vec::new(); names.len()];
    let kind = LISTS.into_iter().find(|list| texts.iter().any(|name| file_of(name) == *list));
    let mut missing = Vec::new();
    for (i, name) in texts.iter().enumerate() {
        let in_file = || format!("{}: {name}", path.display());
        let text = || -> Result<String> {
            let text = String::from_utf8(source.read_text(i)?).context("is not UTF-8")?;
            Ok(text.strip_prefix('\u{feff}').unwrap_or(&text).to_string())
        };
        let folder = name.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
        match kind {
            Some(list) if file_of(name) == list => {
                let entries = if list.ends_with(".csv") { csv(&text()?) } else { jsonl(&text()?) };
                for (picture, of_picture) in entries.with_context(in_file)? {
                    let picture = picture.replace('\\', "/");
                    let picture = format!("{folder}{}", picture.strip_prefix("./").unwrap_or(&picture));
                    match numbers.get(picture.as_str()) {
                        Some(number) => captions[*number].extend(of_picture),
                        None => missing.push(picture),
                    }
                }
            }
            None => {
                let stem = name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem);
                let is_of = |picture: &&String| picture.rsplit_once('.').is_some_and(|(of, _)| of == stem);
                // Names are sorted: those of a stem follow it.
                let first = names.partition_point(|picture| picture.as_str() < stem);
                for picture in names[first..].iter().take_while(|picture| picture.starts_with(stem)).filter(is_of) {
                    let lines = text().with_context(in_file)?;
                    captions[numbers[picture.as_str()]].extend(lines.lines().map(str::to_string));
                }
            }
            _ => {}
        }
    }
    if let Some(first) = missing.first() {
        bail!("{}: captions name {} pictures that are not there; the first is {first}", path.display(), missing.len());
    }
    for of_picture in &mut captions {
        of_picture.iter_mut().for_each(|caption| *caption = caption.replace('\0', " ").trim().to_string());
        of_picture.retain(|caption| !caption.is_empty());
    }
    ensure!(
        captions.iter().any(|of_picture| !of_picture.is_empty()),
        "{}: no picture has a caption; expected {}, or a .txt beside each picture",
        path.display(),
        LISTS.join(", ")
    );
    Ok(captions)
}

/// A picture and its captions.
type Entry = (String, Vec<String>);

fn jsonl(text: &str) -> Result<Vec<Entry>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entry = |(i, line): (usize, &str)| {
        let in_line = || format!("line {}", i + 1);
        let row: Value = serde_json::from_str(line).with_context(in_line)?;
        let found = |keys: &[&str]| keys.iter().find_map(|key| row.get(key)).cloned();
        let file = found(&FILE).and_then(|file| file.as_str().map(str::to_string));
        let captions = match found(&TEXT) {
            Some(Value::String(caption)) => Some(vec![caption]),
            Some(Value::Array(list)) => list.into_iter().map(|v| v.as_str().map(str::to_string)).collect(),
            _ => None,
        };
        file.zip(captions).with_context(|| format!("{}: {}", in_line(), expected()))
    };
    lines.map(entry).collect()
}

fn csv(text: &str) -> Result<Vec<Entry>> {
    let mut rows = records(text).into_iter();
    let headers = rows.next().unwrap_or_default();
    let column = |keys: &[&str]| headers.iter().position(|name| keys.contains(&name.trim()));
    let (file, caption) = column(&FILE).zip(column(&TEXT)).with_context(expected)?;
    let entry = |(i, row): (usize, Vec<String>)| {
        let of = |column: usize| row.get(column).cloned();
        let found = of(file).zip(of(caption)).map(|(file, caption)| (file, vec![caption]));
        found.with_context(|| format!("row {}: {}", i + 1, expected()))
    };
    rows.enumerate().map(entry).collect()
}

/// The rows of a table whose fields are parted by commas (RFC 4180): a field in quotes may hold commas, new lines, and
/// quotes, each written twice. Empty lines are no rows.
fn records(text: &str) -> Vec<Vec<String>> {
    let (mut rows, mut row, mut field, mut quoted) = (Vec::new(), Vec::new(), String::new(), false);
    let mut letters = text.chars().peekable();
    loop {
        match letters.next() {
            Some('"') if quoted && letters.next_if_eq(&'"').is_some() => field.push('"'),
            Some('"') if quoted || field.is_empty() => quoted = !quoted,
            Some(letter) if quoted => field.push(letter),
            Some(',') => row.push(std::mem::take(&mut field)),
            Some('\r') if letters.peek() == Some(&'\n') => {}
            end @ (Some('\n') | None) => {
                if !(row.is_empty() && field.is_empty()) {
                    row.push(std::mem::take(&mut field));
                    rows.push(std::mem::take(&mut row));
                }
                if end.is_none() {
                    return rows;
                }
            }
            Some(letter) => field.push(letter),
        }
    }
}

fn expected() -> String {
    format!("expected a picture ({}) and its caption ({})", FILE.join(", "), TEXT.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of RFC 4180, section 2, with what Python's csv module makes of it.
    #[test]
    fn quoted_fields_hold_commas_quotes_and_new_lines() {
        let table = "file_name,text\r\n1.png,\"a \"\"big\"\" hat, red\"\r\n\r\n2.png,\"two\nlines\",more\n3.png,\n";
        let expected: [&[&str]; 4] = [
            &["file_name", "text"],
            &["1.png", "a \"big\" hat, red"],
            &["2.png", "two\nlines", "more"],
            &["3.png", ""],
        ];
        assert_eq!(records(table), expected);
        assert_eq!(csv(table).unwrap()[1], ("2.png".to_string(), vec!["two\nlines".to_string()]));
        assert!(records("").is_empty() && records("a,\"b").len() == 1);
        assert!(csv("a,b\n1,2\n").unwrap_err().to_string().contains("expected a picture (file_name"));
        assert!(csv("file,text\n1.png\n").unwrap_err().to_string().starts_with("row 1: expected"));
    }
}
