//! Named tensors: read from and written to safetensors (one file, or diffusers' sharded index), held on a device,
//! made trainable or frozen. Bytes from outside are untrusted: nothing is allocated before the header was checked.

use crate::folder::json;
use crate::{Error, Result, limits};
use candle_core::{DType, Device, Tensor, Var};
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek};
use std::path::{Component, Path};

/// The parameters of a network by diffusers' tensor names, in the order of the names.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Reads one safetensors file, or all the shards that an `.index.json` names.
    /// Errors name the file: missing, truncated, not safetensors, or a shard that the index promises and lacks.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        if path.extension().is_some_and(|e| e == "json") { load_shards(path, device) } else { load_file(path, device) }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All names and tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Number of scalars.
    pub fn n_parameters(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// Applies `f` to every tensor.
    pub fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let tensors = self.tensors.iter().map(|(name, t)| Ok((name.clone(), f(t)?))).collect::<Result<_>>()?;
        Ok(Weights { tensors })
    }

    /// Applies `f` to every tensor and its name.
    pub(crate) fn map_named(&self, f: impl Fn(&str, &Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let tensors = self.tensors.iter().map(|(name, t)| Ok((name.clone(), f(name, t)?))).collect::<Result<_>>()?;
        Ok(Weights { tensors })
    }

    /// Takes out the tensors whose names begin with this, without it.
    pub fn take_prefixed(&mut self, prefix: &str) -> Self {
        let names: Vec<String> = self.names().filter(|name| name.starts_with(prefix)).map(str::to_string).collect();
        let take = |name: String| Some((name[prefix.len()..].to_string(), self.tensors.remove(&name)?));
        Weights { tensors: names.into_iter().filter_map(take).collect() }
    }

    /// Adds tensors, with this before their names.
    pub fn extend(&mut self, prefix: &str, more: Self) {
        self.tensors.extend(more.tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
    }

    /// A copy in this dtype on this device (no copy where nothing changes).
    pub fn to(&self, dtype: DType, device: &Device) -> Result<Self> {
        self.map(|t| t.to_dtype(dtype)?.to_device(device))
    }

    /// The same storage, outside the autograd graph: a network built on it sees every update and records nothing.
    pub fn detached(&self) -> Self {
        Weights { tensors: self.tensors.iter().map(|(name, t)| (name.clone(), t.detach())).collect() }
    }

    /// Fresh variables holding copies of these values, f32, and the view of them to build a network on.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>)> {
        let mut vars = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            vars.insert(name.clone(), Var::from_tensor(&tensor.to_dtype(DType::F32)?.copy()?)?);
        }
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Ok((Weights { tensors }, vars))
    }

    /// Writes one safetensors file (through a neighbour that is then renamed) with this metadata.
    pub fn save(&self, path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        let mut bytes = safetensors::serialize(self.tensors.iter(), None).map_err(|e| Error::file(path, e))?;
        if !metadata.is_empty() {
            put_metadata(&mut bytes, metadata).map_err(|e| Error::file(path, e))?;
        }
        write_whole(path, &bytes)
    }
}

/// Puts metadata into the header of a safetensors file, sorted by key. The crate takes a hash map, whose order changes
/// from run to run; here the same weights make the same bytes.
fn put_metadata(bytes: &mut Vec<u8>, metadata: &BTreeMap<String, String>) -> std::result::Result<(), String> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or("no header")?;
    let end = u64::from_le_bytes(*length) as usize;
    let entries = rest[..end].trim_ascii().strip_prefix(b"{").ok_or("a header that is no object")?;
    let mut header = format!("{{\"__metadata__\":{}", serde_json::json!(metadata)).into_bytes();
    if entries != b"}" {
        header.push(b',');
    }
    header.extend_from_slice(entries);
    // Tensors begin at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    bytes.splice(..8 + end, length.into_iter().chain(header));
    Ok(())
}

/// Writes a file aside, flushes it to the disk, and renames it: readers see the old one or the new one, whole.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut aside = path.as_os_str().to_owned();
    aside.push(".partial");
    let aside = std::path::PathBuf::from(aside);
    let write = || {
        let mut file = fs::File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().inspect_err(|_| _ = fs::remove_file(&aside)).map_err(Error::io(path))
}

/// One tensor after the other, so that the file is never in memory beside its tensors.
fn load_file(path: &Path, device: &Device) -> Result<Weights> {
    use candle_core::safetensors::Load;
    let (mut file, header) = open(path)?;
    let mut weights = Weights::default();
    let mut bytes = Vec::new();
    // In the order of their places, without gaps: that much the header was checked for.
    for name in header.offset_keys() {
        let Some(info) = header.info(&name) else { continue };
        bytes.resize(info.data_offsets.1 - info.data_offsets.0, 0);
        file.read_exact(&mut bytes).map_err(Error::io(path))?;
        let in_tensor = |e: &dyn std::fmt::Display| Error::file(path, format!("tensor \"{name}\": {e}"));
        let view = TensorView::new(info.dtype, info.shape.clone(), &bytes).map_err(|e| in_tensor(&e))?;
        let tensor = view.load(device).map_err(|e| in_tensor(&e))?;
        weights.insert(name, tensor);
    }
    Ok(weights)
}

/// A safetensors file at its first tensor, and its header, which accounts for every byte that follows.
fn open(path: &Path) -> Result<(fs::File, safetensors::tensor::Metadata)> {
    let mut file = fs::File::open(path).map_err(missing(path))?;
    let file_bytes = file.metadata().map_err(Error::io(path))?.len();
    let not_whole = |e: &dyn std::fmt::Display| {
        Error::file(path, format!("not a whole safetensors file ({file_bytes} bytes): {e}"))
    };
    let mut start = Vec::new();
    file.by_ref().take(SIGNATURE_BYTES).read_to_end(&mut start).map_err(Error::io(path))?;
    // A header is an object, after eight bytes of its length.
    if start.get(8) != Some(&b'{')
        && let Some(what) = what_it_is(&start).or_else(|| text_of(&start))
    {
        return Err(Error::file(path, format!("not a safetensors file, but {what}")));
    }
    let length = start.first_chunk::<8>().ok_or_else(|| not_whole(&"it has no header"))?;
    let (header_bytes, rest) = (u64::from_le_bytes(*length), file_bytes.saturating_sub(8));
    let Some(data_bytes) = rest.checked_sub(header_bytes) else {
        return Err(not_whole(&format!("a header of {header_bytes} bytes does not fit")));
    };
    if header_bytes > limits::HEADER_BYTES {
        return Err(not_whole(&format!("a header of {header_bytes} bytes, expected at most {}", limits::HEADER_BYTES)));
    }
    let mut header = vec![0u8; header_bytes as usize];
    file.seek(std::io::SeekFrom::Start(8)).map_err(Error::io(path))?;
    file.read_exact(&mut header).map_err(Error::io(path))?;
    let header: safetensors::tensor::Metadata = serde_json::from_slice(&header).map_err(|e| not_whole(&e))?;
    match header.data_len() as u64 {
        promised if promised == data_bytes => Ok((file, header)),
        promised => Err(not_whole(&format!("{promised} bytes of tensors are promised, {data_bytes} are there"))),
    }
}

/// Says of a link that leads nowhere where it led.
pub(crate) fn missing(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |error| match fs::read_link(path) {
        Ok(target) if error.kind() == std::io::ErrorKind::NotFound => {
            let annex = target.components().any(|part| part.as_os_str() == "annex");
            let remedy = if annex { ": run `git annex get` in its repository" } else { "" };
            Error::file(path, format!("a link to {}, which is not there{remedy}", target.display()))
        }
        _ => Error::io(path)(error),
    }
}

/// As much of a file as tells what it is.
const SIGNATURE_BYTES: u64 = 512;
const PICKLED: &str = "pickled weights, which can run any code when they are read: load them in Python and save them with save_pretrained(…, safe_serialization=True)";

/// What a file is, by its first bytes, that is not what its name says.
pub(crate) fn what_it_is(start: &[u8]) -> Option<String> {
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
    let head = text[..text.len().min(64)].to_ascii_lowercase();
    let begins = |signatures: &[&[u8]]| signatures.iter().any(|signature| start.starts_with(signature));
    let what = if text.is_empty() {
        "an empty file"
    } else if head.starts_with(b"version https://git-lfs") {
        "a pointer of Git LFS in the file's place: run `git lfs pull` in its repository"
    } else if head.starts_with(b"/annex/objects/") {
        "a pointer of git-annex in the file's place: run `git annex get` in its repository"
    } else if [&b"<!doctype"[..], b"<html", b"<head", b"<?xml", b"<!--"].iter().any(|tag| head.starts_with(tag)) {
        "a web page, as a download that failed leaves it: download it again"
    } else if begins(&[b"PK\x03\x04", b"PK\x05\x06"]) {
        return Some(format!("a zip archive. torch.save writes such: {PICKLED}"));
    } else if let [0x80, 2..=5, opcode, ..] = start
        && *opcode != 0
    {
        return Some(format!("a Python pickle: {PICKLED}"));
    } else if begins(&[b"\x1f\x8b", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"BZh", b"Rar!"])
        || start.get(257..262) == Some(b"ustar")
    {
        "an archive: unpack it"
    } else if begins(&[b"GGUF", b"\x93NUMPY", b"\x89HDF", b"TFL3"]) || start.get(4..8) == Some(b"TFL3") {
        "a file of another format (GGUF, NumPy, HDF5 or TFLite)"
    } else {
        return None;
    };
    Some(what.to_string())
}

/// Text in the place of weights, by its first line.
fn text_of(start: &[u8]) -> Option<String> {
    // A character may be cut off at the end.
    let text = String::from_utf8_lossy(start);
    let line: String = text.lines().next()?.chars().take(40).collect();
    let is_text = !text.contains('\0') && !line.contains(char::REPLACEMENT_CHARACTER);
    is_text.then(|| format!("text: \"{line}\""))
}

fn load_shards(index: &Path, device: &Device) -> Result<Weights> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let parsed: Index = serde_json::from_value(json::read(index)?)
        .map_err(|e| Error::file(index, format!("not a weight index: {e}")))?;
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut weights = Weights::default();
    let mut shards: BTreeMap<&str, Weights> = BTreeMap::new();
    for (name, shard) in &parsed.weight_map {
        if !matches!(Path::new(shard).components().collect::<Vec<_>>()[..], [Component::Normal(_)]) {
            return Err(Error::file(index, format!("shard \"{shard}\" is not a plain file name")));
        }
        if !shards.contains_key(shard.as_str()) {
            shards.insert(shard, load_file(&folder.join(shard), device)?);
        }
        let tensor = shards[shard.as_str()].get(name);
        let tensor = tensor.ok_or_else(|| {
            Error::file(folder.join(shard), format!("lacks tensor \"{name}\" that {} names", index.display()))
        })?;
        weights.insert(name.clone(), tensor.clone());
    }
    Ok(weights)
}

/// One row `(1, …)` of a tensor of a safetensors file, without reading the others; refused where the tensor is not of this
/// shape, whose first axis counts the rows.
pub fn read_row(path: &Path, name: &str, row: usize, shape: &[usize], device: &Device) -> Result<Tensor> {
    use candle_core::safetensors::Load;
    let (mut file, header) = open(path)?;
    let in_tensor = |e: &dyn std::fmt::Display| Error::file(path, format!("tensor \"{name}\": {e}"));
    let info = header.info(name).ok_or_else(|| in_tensor(&"is missing"))?;
    let n_rows = shape.first().copied().unwrap_or(0);
    if info.shape != shape || row >= n_rows {
        return Err(in_tensor(&format!("has shape {:?}, expected {shape:?} with a row {row}", info.shape)));
    }
    let n_bytes = (info.data_offsets.1 - info.data_offsets.0) / n_rows;
    let first = (info.data_offsets.0 + row * n_bytes) as i64;
    let mut bytes = vec![0; n_bytes];
    file.seek(std::io::SeekFrom::Current(first)).map_err(Error::io(path))?;
    file.read_exact(&mut bytes).map_err(Error::io(path))?;
    let of_row = [&[1], &shape[1..]].concat();
    let view = TensorView::new(info.dtype, of_row, &bytes).map_err(|e| in_tensor(&e))?;
    view.load(device).map_err(|e| in_tensor(&e))
}

/// The names of the tensors of a safetensors file, without reading them.
pub(crate) fn tensor_names(path: &Path) -> Result<Vec<String>> {
    Ok(open(path)?.1.offset_keys())
}

/// The metadata of a safetensors file, without reading its tensors.
pub fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let (_, header) = open(path)?;
    Ok(header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect())
}
