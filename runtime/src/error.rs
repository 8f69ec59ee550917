//! Everything that can go wrong, each naming the file or the place, what was expected and what was found.

use std::path::PathBuf;

use crate::{EngineKind, FORMAT, PassedOver, Tried};

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. `Display` is one sentence for people, except where a list of places follows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason. It stands in the message, so that a chain of causes must not repeat it: a raw name is no
        /// `source()` for thiserror.
        r#source: std::io::Error,
    },
    /// The bytes are no ONNX model, or a broken one.
    #[error("{}: not a whole ONNX file: {reason}", path.display())]
    NotOnnx {
        /// The file.
        path: PathBuf,
        /// Where reading stopped.
        reason: String,
    },
    /// An ONNX model that `dmd export` did not write.
    #[error("{}: not one of ours: the metadata has no dmd.format; the file is {found}", path.display())]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What the file says of itself.
        found: String,
    },
    /// The file was written by a newer `dmd export`.
    #[error("{}: has dmd.format {found}, this build reads up to {FORMAT}: update dmd-runtime", path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The metadata is broken, or says something else than the graph.
    #[error("{}: {reason}", path.display())]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// Which part, what was expected and what was found.
        reason: String,
    },
    /// The engine that was asked for is not part of this build.
    #[error("the {engine} engine is not in this build: enable the feature \"{}\" of dmd-runtime", engine.feature())]
    EngineDisabled {
        /// The engine.
        engine: EngineKind,
    },
    /// No usable ONNX Runtime library was found.
    #[error("no usable ONNX Runtime library; tried{}", crate::library::list(tried))]
    NoLibrary {
        /// Every place, in the order of the search, and why it failed.
        tried: Vec<Tried>,
    },
    /// A process can load one ONNX Runtime library, and has loaded another.
    #[error("cannot load {}: this process already runs ONNX Runtime from {}", asked.display(), loaded.display())]
    OtherLibraryLoaded {
        /// The library that was asked for.
        asked: PathBuf,
        /// The library in use.
        loaded: PathBuf,
    },
    /// The engine did not accept the file.
    #[error("{}: {engine} cannot load it: {reason}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// The engine.
        engine: EngineKind,
        /// The engine's reason.
        reason: String,
    },
    /// Words that name no accelerator.
    #[error("accelerator {given:?}: {reason}")]
    Accelerator {
        /// The words.
        given: String,
        /// What was expected.
        reason: String,
    },
    /// None of the accelerators of the list was taken, and one is required.
    #[error("no accelerator of the list was taken, and one is required:{}", crate::placement::list(passed_over))]
    NoAccelerator {
        /// Each, and why not.
        passed_over: Vec<PassedOver>,
    },
    /// The engine failed while running, or gave something else than the file promises.
    #[error("{engine} failed while running: {reason}")]
    Run {
        /// The engine.
        engine: EngineKind,
        /// The engine's reason.
        reason: String,
    },
    /// What an input is given is not what the file takes.
    #[error("{reason}")]
    Feed {
        /// The input, what was expected and what was found.
        reason: String,
    },
    /// A model of text without a prompt.
    #[error("this model is told text: give a prompt for each picture, or one for all")]
    NoPrompt,
    /// A prompt for a model that takes none.
    #[error(
        "this model takes no prompts{}",
        prompt.as_ref().map(|prompt| format!(": {prompt:?} is part of it")).unwrap_or_default()
    )]
    NotPrompted {
        /// The one prompt that is part of it, if one is.
        prompt: Option<String>,
    },
    /// A prompt that is none of those that are part of the model.
    #[error("the prompt {prompt:?} is none of this model's, which are {prompts:?}")]
    NoSuchPrompt {
        /// The prompt asked for.
        prompt: String,
        /// Those that are there.
        prompts: Vec<String>,
    },
    /// A model that takes prompts, in a build that cannot read any.
    #[error("this model takes prompts, which this build cannot read: enable the feature \"text\" of dmd-runtime")]
    NoTokenizer,
    /// A batch of no pictures.
    #[error("batch is 0, expected at least 1")]
    EmptyBatch,
    /// The system has no memory for the values.
    #[error("there is no memory for {bytes} bytes")]
    NoMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// More values than can be held.
    #[error("{pictures} pictures of {values} values each are too many: at most {limit} values fit in one call")]
    TooLarge {
        /// The pictures asked for.
        pictures: usize,
        /// The values of one.
        values: usize,
        /// The most values of one call.
        limit: usize,
    },
    /// A class that the file does not have.
    #[error("label {label} is not a class of this file, expected 0 to {}", classes.saturating_sub(1))]
    Label {
        /// The label.
        label: i64,
        /// The number of classes.
        classes: usize,
    },
    /// The name of a class that the file does not have.
    #[error("no class of this file is named {name:?}; {}", listed(classes))]
    NoSuchClass {
        /// The name.
        name: String,
        /// The names that there are.
        classes: Vec<String>,
    },
    /// Too few or too many labels.
    #[error("found {found} labels, expected {expected}")]
    LabelCount {
        /// What was given.
        found: usize,
        /// What fits.
        expected: String,
    },
    /// Labels for a generator without classes.
    #[error("this file has no classes, but labels were given")]
    NotLabelled,
    /// The caller's memory does not hold the pictures, or more than them.
    #[error("the buffer has room for {found} values, the pictures are {expected}")]
    BufferSize {
        /// Values or bytes of the buffer.
        found: usize,
        /// What the request takes in its layout.
        expected: usize,
    },
    /// Pixels for a screen of a file whose channels are no colours.
    #[error("pictures of {channels} channels have no red, green, blue and alpha, expected 1 to 4 channels")]
    NoColours {
        /// The channels of the file.
        channels: usize,
    },
    /// A picture could not be written as PNG.
    #[cfg(feature = "image")]
    #[error("the picture cannot be written as PNG: {reason}")]
    Png {
        /// The encoder's reason.
        reason: String,
    },
    /// The request was called off; its pictures are dropped.
    #[error("the request was cancelled")]
    Cancelled,
    /// Noise of the wrong shape.
    #[error("noise has shape {found:?}, expected [N, {}, {}, {}]", expected[0], expected[1], expected[2])]
    NoiseShape {
        /// The shape given.
        found: Vec<usize>,
        /// The file's `[C, H, W]`.
        expected: [usize; 3],
    },
    /// Noise with infinities or NaN, which not every engine passes on to its output.
    #[error("the noise of picture {picture} is not finite")]
    NoiseNotFinite {
        /// The first such picture.
        picture: usize,
    },
    /// The network gave infinities or NaN.
    #[error("picture {picture} of the batch is not finite; the weights in the file are broken")]
    NotFinite {
        /// The first such picture.
        picture: usize,
    },
}

/// Names for a message, the first ones of many.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 20;
    let shown: Vec<_> = names.iter().take(SHOWN).map(|name| crate::printable(name)).collect();
    match names.len() {
        0 => "it has none".into(),
        n if n > SHOWN => format!("it has {n}: {}, ...", shown.join(", ")),
        _ => format!("it has {}", shown.join(", ")),
    }
}
