//! Pictures in: a folder or a zip becomes one block of bytes, with the class of each picture.
//!
//! Everything is decoded once and kept as u8, a quarter of what floats would take; a batch becomes floats when it is
//! drawn. Nothing here knows tensors or networks.
//!
//! Classes are folders. The folders that every picture shares say nothing (a zip usually holds one such folder, or
//! `archive/train`) and are dropped; what is left of a picture's path, without its file name, is its class: `cats`, or
//! `cats/black` for nested folders. Class names and pictures are sorted by their path, byte by byte, so the same files
//! give the same numbers as a folder and as a zip, on every machine.

mod decode;
mod source;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;

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
    /// Refuse the whole set when one picture cannot be read, instead of leaving that one out.
    pub strict: bool,
}

/// A data set in memory. `pixels` holds `len()` pictures, the rest describes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pictures {
    /// `[N, C, H, W]`, 0 to 255.
    pub pixels: Vec<u8>,
    /// The class of each picture, an index into `classes`; empty where there are no classes.
    pub labels: Vec<u32>,
    /// The path of each picture within the folder or zip.
    pub names: Vec<String>,
    /// Sorted; each has at least one picture. Empty for an unconditional set.
    pub classes: Vec<String>,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    /// Pictures that could not be read, in the order of their path.
    pub skipped: Vec<Skipped>,
}

/// A picture that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    pub name: String,
    pub reason: String,
}

/// Reads every picture under `path`, a folder or a zip of PNG, JPEG, WebP, GIF (its first frame) and BMP files.
///
/// Hidden files, `__MACOSX` and files that are no pictures are passed over.
pub fn load(path: &Path, options: &DataOptions) -> Result<Pictures> {
    let [height, width] = options.size;
    ensure!(height > 0 && width > 0, "picture size {height}x{width}: height and width must be at least 1");
    let source = Source::open(path)?;
    let names = source.pictures()?;
    let folders = class_folders(&names, options).with_context(|| path.display().to_string())?;

    let channels = if options.grey { 1 } else { 3 };
    let picture_len = channels * height * width;
    let mut pixels = allocate(names.len(), picture_len)
        .with_context(|| format!("{}: {} pictures at {height}x{width}", path.display(), names.len()))?;
    let failures: Vec<Option<Skipped>> = pixels
        .par_chunks_exact_mut(picture_len)
        .enumerate()
        .map(|(index, pixels)| {
            let read = source.read(index).and_then(|bytes| decode::decode(&bytes, options, pixels));
            read.err().map(|error| Skipped { name: names[index].clone(), reason: format!("{error:#}") })
        })
        .collect();
    let kept: Vec<usize> = (0..names.len()).filter(|&index| failures[index].is_none()).collect();
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

    for (to, &from) in kept.iter().enumerate() {
        pixels.copy_within(from * picture_len..(from + 1) * picture_len, to * picture_len);
    }
    pixels.truncate(kept.len() * picture_len);
    // From the pictures that were read: a class of which none is left could not be learnt.
    let folders: Vec<&str> = kept.iter().filter_map(|&index| folders.get(index).copied()).collect();
    let classes: Vec<&str> = folders.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    let labels = folders.iter().map(|folder| classes.partition_point(|class| class < folder) as u32).collect();
    let classes = classes.into_iter().map(str::to_owned).collect();
    let names = kept.iter().map(|&index| names[index].clone()).collect();
    Ok(Pictures { pixels, labels, names, classes, channels, height, width, skipped })
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

/// The class of each picture: its folder, without the folders that all share. Empty where there are no classes.
fn class_folders<'a>(names: &'a [String], options: &DataOptions) -> Result<Vec<&'a str>> {
    if options.unconditional {
        return Ok(Vec::new());
    }
    let folders: Vec<&str> = names.iter().map(|name| name.rsplit_once('/').map_or("", |(folder, _)| folder)).collect();
    // Names are sorted, so what the first and the last share is shared by all.
    let (first, last) = (folders[0], folders[folders.len() - 1]);
    let shared = first.split('/').zip(last.split('/')).take_while(|(a, b)| a == b).map(|(a, _)| a.len() + 1).sum();
    let folders: Vec<&str> = folders.into_iter().map(|folder| folder.get(shared..).unwrap_or("")).collect();

    let mut beside = names.iter().zip(&folders).filter(|(_, folder)| folder.is_empty()).map(|(name, _)| name);
    let Some(first) = beside.next() else { return Ok(folders) };
    let n_beside = 1 + beside.count();
    if n_beside < names.len() {
        bail!(
            "{n_beside} of {} pictures lie beside the class folders and have no class, such as {first}; \
             move them into a folder, or pass --unconditional",
            names.len()
        );
    }
    Ok(Vec::new())
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
