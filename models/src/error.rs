//! What can go wrong in this crate. Messages name the file or the tensor, what was expected and what was found.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the network library.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed (shapes, dtypes, device memory).
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's own words. They stand in the message, so that a chain of causes must not repeat them: a raw
        /// name is no `source()` for thiserror.
        r#source: std::io::Error,
    },
    /// A file was read, but is not what its name says.
    #[error("{path}: {message}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        message: String,
    },
    /// A configuration field that is unknown, out of range, or not supported here.
    #[error("{0}")]
    Config(String),
    /// Weights that do not fit the network, tensor by tensor.
    #[error("the weights do not fit the network: {0}")]
    Weights(String),
    /// An operation that a backend cannot express.
    #[error("{0}")]
    Unsupported(String),
}

/// For operations that candle calls back.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Tensor(error) => error,
            error => candle_core::Error::Msg(error.to_string()),
        }
    }
}

impl Error {
    /// Puts a path before a message. The message may hold names from the file: what would command a terminal is spelled
    /// out.
    pub fn file(path: impl AsRef<Path>, message: impl std::fmt::Display) -> Self {
        Error::File { path: path.as_ref().to_path_buf(), message: printable(&message.to_string()) }
    }

    /// Puts a path before an error of the operating system.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }
}

/// A text without control characters and marks that turn or break a line; they are written as Rust writes them.
pub(crate) fn printable(text: &str) -> String {
    let commands = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().fold(String::with_capacity(text.len()), |mut text, c| {
        if commands(c) {
            text.extend(c.escape_default())
        } else {
            text.push(c)
        }
        text
    })
}
