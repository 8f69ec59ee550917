//! Pictures in: a folder or a zip becomes one block of bytes, with the class of each picture.
//!
//! Everything is decoded once and kept as u8, a quarter of what floats would take; a batch becomes floats when it is
//! drawn. Nothing here knows tensors or networks.
//!
//! Classes are folders. The folders that every picture shares say nothing (a zip usually holds one such folder, or
//! `archive/train`) and are dropped; what is left of a picture's path, without its file name, is its class: `cats`, or
//! `cats/black` for nested folders. Where the pictures are for a model whose classes are known, a folder that all share and
//! that is named like one of them is that class. Class names and pictures are sorted by their path, byte by byte, so the same files
//! give the same numbers as a folder and as a zip, on every machine.

mod captions;
mod decode;
mod parts;
mod source;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

use crate::classes::{listed, nameless};
use crate::output;
use source::Source;

/// How pictures are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataOptions {
    /// Height and width in pixels: the picture is resized until it covers this and its centre is cut out.
    pub size: [usize; 2],
    /// One channel, the luma, instead of red, green and blue.
    pub grey: bool,
    /// Folders are no classes.
    pub unconditional: bool,
    /// Captions are read, and pictures without any are left out.
    pub captions: bool,
    /// Refuse the whole set when one picture cannot be read, instead of leaving that one out.
    pub strict: bool,
}

impl DataOptions {
    /// Pictures for a model that makes `[C, H, W]`; those that cannot be read are left out.
    pub fn of_model([channels, height, width]: [usize; 3], conditional: bool) -> Result<Self> {
        ensure!(
            [1, 3].contains(&channels),
            "the model's pictures have {channels} channels, those of files are read with 3, or with 1 for grey: \
             such a model can be compared with another model's pictures only"
        );
        Ok(DataOptions {
            size: [height, width],
            grey: channels == 1,
            unconditional: !conditional,
            captions: false,
            strict: false,
        })
    }
}

/// A data set in memory. `pixels` holds `len()` pictures, the rest describes them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pictures {
    /// `[N, C, H, W]`, 0 to 255.
    pub pixels: Vec<u8>,
    /// The class of each picture, an index into `classes`; empty where there are no classes.
    pub labels: Vec<u32>,
    /// The path of each picture within the folder or zip.
    pub names: Vec<String>,
    /// The captions of each picture, at least one; empty where none were asked for.
    pub captions: Vec<Vec<String>>,
    /// Sorted; each has at least one picture. Empty for an unconditional set.
    pub classes: Vec<String>,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    /// Pictures that could not be read, in the order of their path.
    pub skipped: Vec<Skipped>,
    /// The folders that all pictures share, from the outermost, the one that was given first; none of them is a class.
    pub shared: Vec<String>,
    /// What a person should know besides.
    pub notes: Vec<String>,
}

/// A picture that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    pub name: String,
    pub reason: String,
}

/// Reads the pictures and says what was found, with a bar while it goes on.
pub fn load_aloud(path: &Path, options: &DataOptions) -> Result<Pictures> {
    /// Broken pictures named one by one; a broken disk would fill the screen.
    const MAX_NAMED: usize = 20;
    let bar = output::progress(0, 0)?;
    let pictures = load(path, options, |n_done, n| {
        bar.set_length(n as u64);
        bar.set_position(n_done as u64);
    });
    bar.finish_and_clear();
    let pictures = pictures?;
    let Pictures { channels, height, width, classes, skipped, .. } = &pictures;
    let in_classes = match classes.len() {
        0 => "no classes".to_string(),
        n => format!("{n} classes ({})", listed(classes)),
    };
    let n = pictures.len();
    output::say(&format!("{}: {n} pictures, {height}x{width}, {channels} channels, {in_classes}", path.display()));
    for Skipped { name, reason } in skipped.iter().take(MAX_NAMED) {
        output::say(&format!("skipped {name}: {reason}"));
    }
    if !skipped.is_empty() {
        output::warn(&format!(
            "{} of {} pictures are left out, because they cannot be read",
            skipped.len(),
            n + skipped.len()
        ));
    }
    pictures.notes.iter().for_each(|note| output::say(note));
    Ok(pictures)
}

/// Reads every picture under `path`, a folder or a zip of PNG, JPEG, WebP, GIF (its first frame), BMP, TIFF, TGA, QOI, ICO
/// and PNM files. `done` hears how many of how many are through.
///
/// Hidden files, `__MACOSX` and files that are no pictures are passed over; pictures of other kinds are skipped by name.
pub fn load(path: &Path, options: &DataOptions, done: impl Fn(usize, usize) + Sync) -> Result<Pictures> {
    let [height, width] = options.size;
    ensure!(height > 0 && width > 0, "picture size {height}x{width}: height and width must be at least 1");
    let source = Source::open(path)?;
    let names = source.pictures()?;
    let (shared, folders) = class_folders(path, &names, options).with_context(|| path.display().to_string())?;
    let mut captions = if options.captions { captions::of(path, &source, &names)? } else { Vec::new() };

    let channels = if options.grey { 1 } else { 3 };
    let picture_len = channels * height * width;
    let mut pixels = allocate(names.len(), picture_len)
        .with_context(|| format!("{}: {} pictures at {height}x{width}", path.display(), names.len()))?;
    let n_done = AtomicUsize::new(0);
    let failures: Vec<Option<Skipped>> = pixels
        .par_chunks_exact_mut(picture_len)
        .enumerate()
        .map(|(index, pixels)| {
            let name = &names[index];
            let read = source.read(index).and_then(|bytes| decode::decode(name, &bytes, options, pixels));
            done(1 + n_done.fetch_add(1, Relaxed), names.len());
            read.err().map(|error| Skipped { name: name.clone(), reason: format!("{error:#}") })
        })
        .collect();
    let has_caption = |index: &usize| captions.get(*index).is_none_or(|of_picture| !of_picture.is_empty());
    let kept = (0..names.len()).filter(|&index| failures[index].is_none());
    let kept: Vec<usize> = kept.filter(has_caption).collect();
    let n_silent = (0..names.len()).filter(|index| !has_caption(index)).count();
    let skipped: Vec<Skipped> = failures.into_iter().flatten().collect();
    if let Some(first) = skipped.first() {
        let (n_bad, n_all) = (skipped.len(), names.len());
        ensure!(
            !options.strict && !kept.is_empty(),
            "{}: {n_bad} of {n_all} pictures cannot be read; the first is {}: {}",
            path.display(),
            first.name,
            first.reason
        );
    }
    let classes: BTreeSet<&str> = folders.iter().copied().collect();
    let left: BTreeSet<&str> = kept.iter().filter_map(|&index| folders.get(index).copied()).collect();
    if let Some(lost) = classes.difference(&left).next() {
        let of_it = names.iter().zip(&folders).filter(|(_, folder)| folder == &lost).map(|(name, _)| name);
        let (first, n) =
            (skipped.iter().find(|skipped| of_it.clone().any(|name| *name == skipped.name)), of_it.count());
        let first = first.map_or_else(String::new, |first| format!("; the first is {}: {}", first.name, first.reason));
        bail!(
            "{}: none of the {n} pictures of class \"{lost}\" can be read{first}. Convert them, or take the folder away",
            path.display()
        );
    }

    for (to, &from) in kept.iter().enumerate() {
        pixels.copy_within(from * picture_len..(from + 1) * picture_len, to * picture_len);
    }
    pixels.truncate(kept.len() * picture_len);
    let folders: Vec<&str> = kept.iter().filter_map(|&index| folders.get(index).copied()).collect();
    let classes: Vec<&str> = classes.into_iter().collect();
    let labels = folders.iter().map(|folder| classes.partition_point(|class| class < folder) as u32).collect();
    let classes = classes.into_iter().map(str::to_owned).collect();
    let names: Vec<String> = kept.iter().map(|&index| names[index].clone()).collect();
    let others = source.others().filter(|_| !options.captions);
    let notes = others.map(|others| format!("passed over other files: {others}")).into_iter();
    let silent = (n_silent > 0).then(|| format!("{n_silent} pictures without captions are left out"));
    let notes = notes.chain(silent).chain(parts::note(&names, options.unconditional)).collect();
    let captions = kept.iter().filter_map(|&index| captions.get_mut(index).map(std::mem::take)).collect();
    Ok(Pictures { pixels, labels, names, captions, classes, channels, height, width, skipped, shared, notes })
}

impl Pictures {
    /// How many pictures there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// True for a set without pictures, which `load` never gives.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The label that a model with these classes has for each picture; none where the pictures have no classes. `path` is
    /// where they are from.
    pub fn labels_of(&self, path: &Path, classes: &[String]) -> Result<Option<Vec<u32>>> {
        let label_of = |class: &String| classes.iter().position(|name| name == class).map(|label| label as u32);
        if self.classes.is_empty() {
            let mut suffixes = (0..self.shared.len()).map(|first| self.shared[first..].join("/"));
            let label = suffixes.find_map(|folder| label_of(&folder));
            return Ok(label.map(|label| vec![label; self.len()]));
        }
        let label_of = |class: &String| {
            label_of(class).with_context(|| {
                let remedy = match nameless(classes) {
                    true => format!(
                        "the model has only numbers for its classes: name them in its dmd.json, in the order of their labels, \
                         as {{\"classes\": [{}]}}, or rename the folders to numbers",
                        listed(&self.classes.iter().map(|class| format!("{class:?}")).collect::<Vec<_>>())
                    ),
                    false => "rename the folders like the classes".into(),
                };
                format!("{}: class \"{class}\" is none of the model's ({}); {remedy}", path.display(), listed(classes))
            })
        };
        let labels = self.classes.iter().map(label_of).collect::<Result<Vec<u32>>>()?;
        Ok(Some(self.labels.iter().map(|label| labels[*label as usize]).collect()))
    }

    /// Indices to train on and indices held out, each ascending. `held_out` is a fraction in `[0, 1)`; where it is not
    /// zero at least one picture lands on each side. The same set, fraction and seed give the same split.
    pub fn split(&self, held_out: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
        let n_held_out = match self.len() {
            n if n > 1 && held_out > 0.0 => ((n as f64 * held_out).round() as usize).clamp(1, n - 1),
            _ => 0,
        };
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.sort_by_key(|&index| mix(mix(seed) ^ index as u64));
        let mut train = order.split_off(n_held_out);
        train.sort_unstable();
        order.sort_unstable();
        (train, order)
    }

    /// Pictures `[B, C, H, W]` in `[-1, 1]`, as `x / 127.5 - 1`, and their labels (none for an unconditional set).
    /// Where `flips` is true the picture is mirrored left to right.
    ///
    /// # Panics
    /// When an index is not below `len()`, or `flips` is not as long as `indices`.
    pub fn batch(&self, indices: &[usize], flips: &[bool]) -> (Vec<f32>, Vec<u32>) {
        assert_eq!(indices.len(), flips.len(), "one flip for each picture of the batch");
        let picture_len = self.channels * self.height * self.width;
        let to_float = |&byte: &u8| f32::from(byte) / 127.5 - 1.0;
        let mut images = Vec::with_capacity(indices.len() * picture_len);
        for (&index, &flip) in indices.iter().zip(flips) {
            let picture = &self.pixels[index * picture_len..(index + 1) * picture_len];
            if flip {
                picture.chunks_exact(self.width).for_each(|row| images.extend(row.iter().rev().map(to_float)));
            } else {
                images.extend(picture.iter().map(to_float));
            }
        }
        let labels = indices.iter().filter_map(|&index| self.labels.get(index).copied()).collect();
        (images, labels)
    }
}

/// The folders that all pictures share, and the class of each picture: its folder without those. No classes where there
/// are none.
fn class_folders<'a>(path: &Path, names: &'a [String], options: &DataOptions) -> Result<(Vec<String>, Vec<&'a str>)> {
    let folders: Vec<&str> = names.iter().map(|name| name.rsplit_once('/').map_or("", |(folder, _)| folder)).collect();
    // Names are sorted, so what the first and the last share is shared by all.
    let (first, last) = (folders[0], folders[folders.len() - 1]);
    let inside: Vec<&str> = first.split('/').zip(last.split('/')).take_while(|(a, b)| a == b).map(|(a, _)| a).collect();
    let n_shared = inside.iter().map(|folder| folder.len() + 1).sum();
    let given = path.canonicalize().ok().and_then(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
    let inside = inside.into_iter().filter(|folder| !folder.is_empty()).map(String::from);
    let shared = [given.unwrap_or_default()].into_iter().chain(inside).collect();
    if options.unconditional {
        return Ok((shared, Vec::new()));
    }
    let folders: Vec<&str> = folders.into_iter().map(|folder| folder.get(n_shared..).unwrap_or("")).collect();
    parts::refuse(path, &folders)?;

    let mut beside = names.iter().zip(&folders).filter(|(_, folder)| folder.is_empty()).map(|(name, _)| name);
    let Some(first) = beside.next() else { return Ok((shared, folders)) };
    let n_beside = 1 + beside.count();
    if n_beside < names.len() {
        bail!(
            "{n_beside} of {} pictures lie beside the class folders and have no class, such as {first}; \
             move them into a folder, or pass --unconditional",
            names.len()
        );
    }
    Ok((shared, Vec::new()))
}

/// Room for all pixels, or an error where the machine has none.
fn allocate(n_pictures: usize, picture_len: usize) -> Result<Vec<u8>> {
    let bytes = n_pictures.checked_mul(picture_len).context("more bytes than this machine can count")?;
    let mut pixels = Vec::new();
    pixels.try_reserve_exact(bytes).with_context(|| format!("no memory for {bytes} bytes of pixels"))?;
    pixels.resize(bytes, 0);
    Ok(pixels)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection that scatters neighbouring numbers.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
