//! What can go wrong while exporting. Messages name the file, the node or the field, and the remedy.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the exporter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The network could not be traced or run.
    #[error(transparent)]
    Network(#[from] dmd_models::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The runtime could not load or run the file.
    #[error(transparent)]
    Runtime(#[from] dmd_runtime::Error),
    /// A setting out of range, or settings that do not fit the network.
    #[error("{0}")]
    Setting(String),
    /// A node that cannot be: shapes that do not fit, or an operation that the dialect does not have.
    #[error("node \"{node}\": {message}")]
    Node {
        /// Name of the node.
        node: String,
        /// What does not fit.
        message: String,
    },
    /// The lowered graph breaks a rule of its dialect: a fault of the exporter.
    #[error("the exported graph is not well-formed (please report this): {}", .0.join("; "))]
    Malformed(Vec<String>),
    /// A value that half precision cannot hold.
    #[error(
        "node \"{node}\": the value {value:e} does not fit fp16, whose largest is 65504; no file was written: export \
         with --precision fp32 or w8"
    )]
    Overflow {
        /// Name of the node or the constant.
        node: String,
        /// The magnitude before it was rounded; infinite where it was no number.
        value: f32,
    },
    /// More than one ONNX file can hold.
    #[error("the model has {bytes} bytes, a single ONNX file holds at most {limit}; export with --external-data")]
    TooLarge {
        /// Size of the encoded model.
        bytes: usize,
        /// Limit of the format.
        limit: usize,
    },
    /// More than the caller allows.
    #[error(
        "the file would have {bytes} bytes, --max-size allows {limit}; export with --precision fp16 (half of fp32) or \
         w8 (a quarter), or allow more"
    )]
    OverMaxSize {
        /// Size of the file, its external data included.
        bytes: usize,
        /// What was allowed.
        limit: usize,
    },
    /// A part of a model of several.
    #[error("{part}: {source}")]
    Part {
        /// `text_encoder`, `generator`, `decoder`, or the whole path.
        part: String,
        /// What is wrong with it. It stands in the message, so that a chain of causes must not repeat it: a raw name is no
        /// `source()` for thiserror.
        r#source: Box<Error>,
    },
    /// The file is there already.
    #[error("{path}: exists already, and is only replaced with --force")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file could not be written.
    #[error("{path}: cannot write: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's own words. They stand in the message, so that a chain of causes must not repeat them: a raw
        /// name is no `source()` for thiserror.
        r#source: std::io::Error,
    },
    /// A file could not be read.
    #[error("{path}: cannot read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's own words.
        r#source: std::io::Error,
    },
    /// The bytes are no ONNX model.
    #[error("{path}: not an ONNX file: {reason}")]
    NotOnnx {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        reason: String,
    },
    /// No engine could run the file, so nothing is known about it.
    #[error(
        "no engine could check the file, so none was written: {}; --allow-unverified writes it all the same",
        .0.join("; ")
    )]
    Unverified(Vec<String>),
    /// An engine failed, or gave other pictures than candle. No file was left.
    #[error("the exported file failed its check, so none was written: {}", .0.join("; "))]
    Verification(Vec<String>),
}

impl Error {
    /// Puts a path before an error of the operating system.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }
}
