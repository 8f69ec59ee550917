//! Rows of tensors that are computed once for a run: in a folder of shards, known by what they were made of, and read one at
//! a time, so that all of them need not be in memory.

use crate::output;
use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dmd_models::{Weights, read_row, write_whole};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Rows in a folder.
pub struct Rows {
    folder: PathBuf,
    n: usize,
}

/// What rows are, and what they were made of: each under the words that a message has for it, by its hash.
pub struct Made<'a> {
    /// Such as "text states".
    pub what: &'a str,
    /// Such as "text encoder".
    pub of: &'a [(&'a str, &'a str)],
    /// Shape of a row by name; all are f32.
    pub shapes: &'a BTreeMap<&'static str, Vec<usize>>,
}

/// `rows.json`.
#[derive(PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    of: BTreeMap<String, String>,
    n: usize,
    per_shard: usize,
}

/// Rows in a shard: text states of Stable Diffusion 1.5 take 60 MB.
const PER_SHARD: usize = 256;

impl Made<'_> {
    /// Makes `n` rows in `folder`, going on where an earlier call stopped; says how many were made. `make` is asked for a
    /// range of them, on the CPU. A folder that holds rows of something else is refused.
    pub fn keep(&self, folder: &Path, n: usize, mut make: impl FnMut(Range<usize>) -> Result<Weights>) -> Result<Rows> {
        self.claim(folder, n)?;
        let rows = Rows { folder: folder.into(), n };
        let bar = output::progress(n as u64, 0)?;
        let mut made = 0;
        for first in (0..n).step_by(PER_SHARD) {
            let range = first..n.min(first + PER_SHARD);
            let is_whole = self.shapes.iter().all(|(name, shape)| rows.row(name, first, shape).is_ok());
            if !is_whole {
                let shard = make(range.clone())?;
                for (name, values) in shard.iter() {
                    let sum: f32 = values.abs()?.sum_all()?.to_scalar()?;
                    ensure!(sum.is_finite(), "{} {} to {} ({name}) are not finite", self.what, first, range.end - 1);
                }
                shard.save(&rows.shard(first), &BTreeMap::new())?;
                made += range.len();
            }
            bar.set_position(range.end as u64);
        }
        bar.finish_and_clear();
        output::say(&format!("{n} {} in {} ({made} made now)", self.what, folder.display()));
        Ok(rows)
    }

    /// Writes down whose rows a folder holds, or compares.
    fn claim(&self, folder: &Path, n: usize) -> Result<()> {
        let of = self.of.iter().map(|(name, hash)| (name.to_string(), hash.to_string())).collect();
        let manifest = Manifest { of, n, per_shard: PER_SHARD };
        let path = folder.join("rows.json");
        if !path.exists() {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            return Ok(write_whole(&path, format!("{:#}\n", serde_json::to_value(&manifest)?).as_bytes())?);
        }
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let found: Manifest = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        let other = self.of.iter().find(|(name, hash)| found.of.get(*name).is_none_or(|found| found != hash));
        ensure!(
            found == manifest,
            "{}: holds {} of other {}; remove it, or give --force, which begins anew",
            folder.display(),
            self.what,
            other.map_or("numbers than are expected", |(name, _)| name)
        );
        Ok(())
    }
}

impl Rows {
    /// A row `(1, …)` of this name, number and shape, on the CPU.
    pub fn row(&self, name: &str, i: usize, shape: &[usize]) -> Result<Tensor> {
        let first = i / PER_SHARD * PER_SHARD;
        let whole = [&[PER_SHARD.min(self.n - first)], shape].concat();
        Ok(read_row(&self.shard(first), name, i - first, &whole, &Device::Cpu)?)
    }

    fn shard(&self, first: usize) -> PathBuf {
        self.folder.join(format!("shard-{:05}.safetensors", first / PER_SHARD))
    }
}
