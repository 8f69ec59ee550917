//! JSON files as Python reads and writes them: `NaN`, `Infinity` and `-Infinity` stand for themselves there, which
//! strict JSON has not. In a `Value` they are strings of that name, so that no number is ever one of them.

use crate::weights::what_it_is;
use crate::{Error, Result, limits};
use serde_json::Value;
use std::fs;
use std::path::Path;

const MARKS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads a file. One that is no JSON is named as what it is.
pub fn read(path: &Path) -> Result<Value> {
    let bytes = fs::metadata(path).map_err(Error::io(path))?.len();
    if bytes > limits::JSON_BYTES {
        return Err(Error::file(path, format!("has {bytes} bytes, expected at most {}", limits::JSON_BYTES)));
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let text = std::str::from_utf8(&bytes).map_err(|e| match what_it_is(&bytes) {
        Some(what) => Error::file(path, format!("not JSON, but {what}")),
        None => Error::file(path, format!("not JSON: {e}")),
    })?;
    parse(path, text)
}

/// Reads a text that lay in `path`.
pub fn parse(path: &Path, text: &str) -> Result<Value> {
    serde_json::from_str(text).or_else(|strict| {
        serde_json::from_str(&marked(text)).map_err(|_| match what_it_is(text.as_bytes()) {
            Some(what) => Error::file(path, format!("not JSON, but {what}")),
            None => Error::file(path, format!("not JSON: {strict}")),
        })
    })
}

/// The text of a value, with those three written bare again, as Python reads them.
pub fn text(value: &Value) -> String {
    let text = format!("{value:#}");
    MARKS.iter().fold(text, |text, mark| text.replace(&format!(": \"{mark}\""), &format!(": {mark}")))
}

/// A value as it stood in the file, for a message.
pub fn shown(value: &Value) -> String {
    match value.as_str().and_then(|text| MARKS.iter().find(|mark| **mark == text)) {
        Some(mark) => mark.to_string(),
        None => value.to_string(),
    }
}

/// The text with quotes around those three, wherever they stand outside of strings.
fn marked(text: &str) -> String {
    let (mut marked, mut rest, mut in_string) = (String::with_capacity(text.len() + 64), text, false);
    while let Some(c) = rest.chars().next() {
        let mark = MARKS.iter().find(|mark| !in_string && rest.starts_with(**mark));
        let taken = match mark {
            Some(mark) => mark.len(),
            // What is escaped, a quote above all, ends no string.
            None if c == '\\' => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            None => c.len_utf8(),
        };
        in_string ^= c == '"';
        let (token, after) = rest.split_at(taken);
        match mark {
            Some(_) => marked.extend(["\"", token, "\""]),
            None => marked.push_str(token),
        }
        rest = after;
    }
    marked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_infinities_are_read_and_written_again() {
        let read = |text: &str| parse(Path::new("a.json"), text).unwrap();
        let file = r#"{"a": -Infinity, "b": [NaN, Infinity], "c": "a \" -Infinity, NaN", "ä\\": 1}"#;
        let value = read(file);
        assert_eq!(value["a"], "-Infinity");
        assert_eq!(value["b"], serde_json::json!(["NaN", "Infinity"]));
        assert_eq!(value["c"], "a \" -Infinity, NaN");
        assert_eq!(
            text(&read(r#"{"a": -Infinity, "b": "say: NaN"}"#)),
            "{\n  \"a\": -Infinity,\n  \"b\": \"say: NaN\"\n}"
        );
        assert_eq!(shown(&value["a"]), "-Infinity");
        assert_eq!(shown(&value["c"]), r#""a \" -Infinity, NaN""#);
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in ["", "{", "[NaN", "{\"a\": +Infinity}", "{\"a\": Nan}", "{\"a\": -Infinityy}", "\"\\", "é\\"] {
            assert!(parse(Path::new("a.json"), text).is_err(), "{text}");
        }
    }
}
