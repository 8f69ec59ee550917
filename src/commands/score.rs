//! `dmd score`: how far a model's pictures are from real ones, or from another model's.

use super::is_exported;
use super::sample::Source;
use crate::cli::{SampleArgs, ScoreArgs};
use crate::data::{self, DataOptions};
use crate::eval::{distance, kernel_distance};
use crate::output::say;
use crate::regression::Features;
use crate::sample::labels_in_turn;
use anyhow::{Context, Result, ensure};
use clap::Parser;
use ndarray::{Array2, Array4};
use serde_json::{Value, json};
use std::path::Path;

/// Scores a model against each reference.
pub fn run(args: &ScoreArgs, threads: Option<usize>) -> Result<Value> {
    ensure!(args.n >= 2, "-n is {}, expected at least 2", args.n);
    let mut source = open(&args.model, args, threads)?;
    let features = args.features.as_ref().map(|path| Features::load(path)).transpose()?;
    let shape = source.shape();
    let mut results = Vec::new();
    for against in &args.against {
        // A data set decides how often each class comes; a model's pictures are drawn in the same proportion.
        let (reference, labels) =
            match against.is_dir() && against.join("model_index.json").exists() || is_exported(against) {
                true => {
                    let mut other = open(against, args, threads)?;
                    ensure!(
                        other.shape() == shape,
                        "{}: makes pictures of {:?}, {} of {shape:?}",
                        against.display(),
                        other.shape(),
                        args.model.display()
                    );
                    let labels = labels_in_turn(args.n, Some(source.classes().len()).filter(|n| *n > 0));
                    (draw(&mut other, args, &labels, args.seed + 1)?, labels)
                }
                false => pictures(against, shape, args.n, source.classes())?,
            };
        let n = reference.dim().0;
        let found = draw(&mut source, args, &labels, args.seed)?;
        let sliced = distance(&found, &reference)?;
        let kid = match &features {
            Some(features) => {
                let rows = |images: &Array4<f32>| -> Result<Array2<f64>> { features.rows(images, BATCH) };
                Some(kernel_distance(rows(&found)?.view(), rows(&reference)?.view())?)
            }
            None => None,
        };
        let kid_text = kid.map_or_else(String::new, |kid| format!(", kernel distance {kid:.5}"));
        say(&format!("against {} ({n} pictures): sliced wasserstein {sliced:.4}{kid_text}", against.display()));
        results
            .push(json!({ "against": against, "pictures": n, "sliced_wasserstein": sliced, "kernel_distance": kid }));
    }
    Ok(json!({ "model": args.model, "scores": results }))
}

/// Pictures through the features at a time.
const BATCH: usize = 64;

fn open(model: &Path, args: &ScoreArgs, threads: Option<usize>) -> Result<Source> {
    let mut sample = SampleArgs::parse_from(["sample".as_ref(), model.as_os_str()]);
    sample.device = args.device;
    sample.seed = args.seed;
    sample.guidance = if is_exported(model) { 1.0 } else { args.guidance };
    Source::open(&sample, threads)
}

fn draw(source: &mut Source, args: &ScoreArgs, labels: &[i64], seed: u64) -> Result<Array4<f32>> {
    let n = if labels.is_empty() { args.n } else { labels.len() };
    source.pictures(&dmd_runtime::picture_noise(seed, 0, n, source.shape()), labels, BATCH)
}

/// At most `n` pictures of a data set, spread evenly over it, and their classes as the model's labels.
pub fn pictures(path: &Path, [c, h, w]: [usize; 3], n: usize, classes: &[String]) -> Result<(Array4<f32>, Vec<i64>)> {
    let options = DataOptions { size: [h, w], grey: c == 1, unconditional: classes.is_empty(), strict: false };
    let all = data::load(path, &options, |_, _| {})?;
    let n = n.min(all.len());
    let picks: Vec<usize> = (0..n).map(|i| i * all.len() / n).collect();
    let (pixels, found) = all.batch(&picks, &vec![false; n]);
    let label = |label: u32| -> Result<i64> {
        let class = &all.classes[label as usize];
        let position = classes.iter().position(|name| name == class);
        let position = position.with_context(|| {
            format!("{}: class \"{class}\" is none of the model's ({})", path.display(), classes.join(", "))
        })?;
        Ok(position as i64)
    };
    ensure!(classes.is_empty() || !found.is_empty(), "{}: has no classes, the model has", path.display());
    let labels = if classes.is_empty() { Vec::new() } else { found.into_iter().map(label).collect::<Result<_>>()? };
    Ok((Array4::from_shape_vec((n, c, h, w), pixels)?, labels))
}
