//! Names that come from files, made harmless for a terminal.

use std::borrow::Cow;

/// A text from a file as it may be printed: control characters, and those that turn a line round or break it, are
/// written as Rust writes them, so that no name moves the cursor, sets a title or hides what follows it.
///
/// ```
/// assert_eq!(dmd_runtime::printable("étoile ⭐"), "étoile ⭐");
/// assert_eq!(dmd_runtime::printable("a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
/// ```
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_command) {
        return Cow::Borrowed(text);
    }
    let mut harmless = String::with_capacity(text.len());
    for c in text.chars() {
        if is_command(c) { harmless.extend(c.escape_default()) } else { harmless.push(c) }
    }
    Cow::Owned(harmless)
}

/// What a program has to say that quotes names of a file: its lines side by side, each printable.
#[cfg(any(feature = "onnxruntime", test))]
pub(crate) fn printable_lines(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(printable);
    lines.collect::<Vec<_>>().join(" | ")
}

/// Control characters of both blocks, separators of lines and paragraphs, and marks of direction.
fn is_command(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_to_a_terminal_are_spelled_out_and_scripts_are_left_alone() {
        for (text, expected) in [
            ("circle", "circle"),
            ("星 ⭐ é \"q\" \\", "星 ⭐ é \"q\" \\"),
            ("a\x1b]0;title\x07", "a\\u{1b}]0;title\\u{7}"),
            ("x\r\n\ty", "x\\r\\n\\ty"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("gpj\u{202e}exe", "gpj\\u{202e}exe"),
        ] {
            assert_eq!(printable(text), expected);
        }
        assert_eq!(printable_lines("two\n  lines\x08\n\n"), "two | lines\\u{8}");
    }
}
