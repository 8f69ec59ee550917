//! `model.json`, what an exported folder says of itself: the parts of a model that is not one file.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ModuleInfo;
use crate::{Error, Result};

/// The name of the file.
pub const MODEL_JSON: &str = "model.json";

/// The newest version of it that this build reads, and the one that it writes.
const FOLDER_FORMAT: u32 = 1;

/// The most bytes of it. A few hundred are usual.
const MAX_BYTES: u64 = 1 << 20;

/// What an exported folder holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderInfo {
    /// The version of the description.
    pub format: u32,
    /// The version of dmd that wrote it.
    pub version: String,
    /// The parts in the order in which data passes: `text_encoder` where prompts are free, `generator`, and `decoder` where
    /// that makes latents.
    pub parts: Vec<Part>,
    /// How prompts become ids, for each input of the text encoder; empty where there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<PromptLimits>,
    /// Where the data came from, and under which licence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

/// A part of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// `text_encoder`, `generator` or `decoder`.
    pub name: String,
    /// Its file in the folder.
    pub file: String,
    /// The hash of its weights, which its file has too: parts of other models are told apart by it.
    pub weights_sha256: String,
}

/// How a prompt becomes ids: `begin`, at most `tokens − 2` of its own, `end`, and `padding` up to `tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptLimits {
    /// The tokenizer's file in the folder.
    pub tokenizer: String,
    /// The id before a prompt.
    pub begin: u32,
    /// The id behind it.
    pub end: u32,
    /// The id that fills the rest.
    pub padding: u32,
    /// Ids of a prompt, whatever its length.
    pub tokens: usize,
}

impl Default for FolderInfo {
    /// No parts, for the exporter to fill in.
    fn default() -> Self {
        let version = env!("CARGO_PKG_VERSION").into();
        FolderInfo { format: FOLDER_FORMAT, version, parts: vec![], prompts: vec![], data: None }
    }
}

impl FolderInfo {
    /// Reads the description, and holds every part's file to it: that it is there, is of the model that the description
    /// names, and is one that may run.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(MODEL_JSON);
        let io = |source| Error::Io { path: path.clone(), source };
        let refuse = |path: PathBuf, reason: String| Error::Inconsistent { path, reason };
        let bytes = std::fs::metadata(&path).map_err(io)?.len();
        if bytes > MAX_BYTES {
            return Err(refuse(path.clone(), format!("has {bytes} bytes, expected at most {MAX_BYTES}")));
        }
        let text = std::fs::read(&path).map_err(io)?;
        let format = serde_json::from_slice::<serde_json::Value>(&text).ok().and_then(|json| json["format"].as_u64());
        if let Some(found) = format.filter(|format| *format > FOLDER_FORMAT.into()) {
            return Err(Error::NewerFormat { path, found: u32::try_from(found).unwrap_or(u32::MAX) });
        }
        let info: FolderInfo = serde_json::from_slice(&text)
            .map_err(|error| refuse(path.clone(), format!("is no description of a folder of parts: {error}")))?;
        let names: Vec<&str> = info.parts.iter().map(|part| part.name.as_str()).collect();
        let known = ["text_encoder", "generator", "decoder"];
        let mut in_order = known.iter().filter(|known| names.contains(known));
        if !names.contains(&"generator") || !names.iter().all(|name| in_order.next() == Some(name)) {
            let reason =
                format!("has the parts {names:?}, expected of {known:?}, in this order, the generator at least");
            return Err(refuse(path, reason));
        }
        let files = info.parts.iter().map(|part| &part.file).chain(info.prompts.iter().map(|limits| &limits.tokenizer));
        for file in files {
            // A name, and no way out of the folder.
            if Path::new(file).file_name().is_none_or(|name| name != file.as_str()) {
                return Err(refuse(path, format!("names the file {file:?}, expected a name within the folder")));
            }
            if !folder.join(file).is_file() {
                return Err(refuse(folder.join(file), format!("is not there, and {MODEL_JSON} names it")));
            }
        }
        for part in &info.parts {
            let found = ModuleInfo::read(folder.join(&part.file))?.weights_sha256;
            if found != part.weights_sha256 {
                let reason = format!(
                    "is of another model: its weights have the hash {found:?}, {MODEL_JSON} says {:?}",
                    part.weights_sha256
                );
                return Err(refuse(folder.join(&part.file), reason));
            }
        }
        Ok(info)
    }

    /// The description as it stands in the file.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("names, numbers and lists of them have a JSON form")
    }

    /// A part by its name.
    pub fn part(&self, name: &str) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == name)
    }
}
