//! `dmd score`: how far a model's pictures are from real ones, or from another model's.

use super::sample::{Sampling, Source};
use super::{is_exported, model_path, without_effect};
use crate::classes::listed;
use crate::cli::{ScoreArgs, WrongUsage};
use crate::data::{self, DataOptions};
use crate::eval::{
    Floor, Measured, as_rows, directions, frechet_distance_of, kernel_distance_of, measure, sliced_wasserstein_of,
};
use crate::features::Features;
use crate::limits;
use crate::output::{self, say, warn};
use crate::prompts;
use crate::random::Purpose;
use crate::sample::labels_in_turn;
use anyhow::{Context, Result, ensure};
use dmd_models::ModelFolder;
use ndarray::{Array2, Array4};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Scores a model against each reference.
pub fn run(args: &ScoreArgs, threads: Option<usize>) -> Result<Value> {
    let path = model_path(&args.model)?;
    let against: Vec<PathBuf> = args.against.iter().map(|path| model_path(path)).collect::<Result<_>>()?;
    check_usage(args, &path, &against)?;
    let prompts = args.prompts.as_deref().map_or(Ok(Vec::new()), prompts::read)?;
    let mut source = open(&path, args, &prompts, threads)?;
    // All of them before the first is scored: what is missing is found at once.
    let references = against.iter().map(|path| Reference::open(path, &source, args, &prompts, threads));
    let references = references.collect::<Result<Vec<_>>>()?;
    let mut features = args.features.as_ref().map(|path| Features::load("--features", path, threads)).transpose()?;
    let guided = source.is_teacher()
        || references.iter().any(|reference| matches!(reference, Reference::Model(source, _) if source.is_teacher()));
    without_effect("--guidance", args.guidance.is_some() && !guided, "it is for teachers")?;
    let mut results = Vec::new();
    let mut drawn: Option<(Vec<i64>, Seen)> = None;
    for (path, reference) in against.iter().zip(references) {
        let (labels, images) = reference.pictures(args, &prompts)?;
        let n = labels.len();
        if n < FEW {
            warn(&format!("{n} pictures: fewer than {FEW} say little, and compare with no other number's scores"));
        }
        let seen = Seen::new(images, features.as_mut())?;
        // A data set decides how often each class comes; a model's pictures are drawn in the same proportion.
        if drawn.as_ref().is_none_or(|(of, _)| *of != labels) {
            let model_labels = if source.classes().is_empty() { &[][..] } else { &labels };
            let images = draw(&mut source, Purpose::Scored, args.seed, n, (model_labels, &prompts))?;
            drawn = Some((labels.clone(), Seen::new(images, features.as_mut())?));
        }
        let (_, found) = drawn.as_ref().expect("the model's pictures were just drawn");
        let score = Score::new(found, &seen, &labels)?;
        output::result(&score.text(path, features.as_ref()))?;
        results.push(score.json(path, features.as_ref()));
    }
    if features.is_none() {
        say("pixels alone flatter: they tell colours, layout and variety, not whether a detail is right; \
             --features NETWORK.onnx looks closer");
    }
    Ok(json!({ "model": path, "scores": results }))
}

/// Below this many pictures a score is mostly their number's doing.
const FEW: usize = 1000;
/// Pictures through a model at a time.
const BATCH: usize = 64;

fn check_usage(args: &ScoreArgs, model: &Path, against: &[PathBuf]) -> Result<()> {
    if !(2..=limits::PICTURES).contains(&(args.n as u64)) {
        return Err(WrongUsage(format!("-n is {}, expected 2 to {}", args.n, limits::PICTURES)).into());
    }
    let models: Vec<&Path> = [model].into_iter().chain(against.iter().map(PathBuf::as_path)).collect();
    let for_none = args.device.is_some() && !models.iter().any(|path| path.is_dir());
    without_effect("--device", for_none, "it is for the models of folders")
}

fn open(path: &Path, args: &ScoreArgs, prompts: &[String], threads: Option<usize>) -> Result<Source> {
    let device = args.device.filter(|_| !is_exported(path));
    let mut source = Source::open(path, &Sampling { device, seed: args.seed, threads, ..Sampling::default() })?;
    source.check_prompts(prompts, "--prompts FILE").with_context(|| path.display().to_string())?;
    source.guide(args.guidance.unwrap_or(1.0))?;
    Ok(source)
}

/// Pictures of a seed that no other command draws, of labels where the model has classes, of prompts where it is told text.
fn draw(
    source: &mut Source,
    purpose: Purpose,
    seed: u64,
    n: usize,
    (labels, prompts): (&[i64], &[String]),
) -> Result<Array4<f32>> {
    limits::pictures("-n", n as u64, source.shape())?;
    let [c, h, w] = source.noise_shape();
    let picture = |i: usize| dmd_runtime::noise::Stream::new(seed, purpose as u32, i as u64).normal(c * h * w);
    let noise = Array4::from_shape_vec((n, c, h, w), (0..n).flat_map(picture).collect())?;
    let bar = output::progress(n as u64, 0)?;
    let made = source.make(&noise, labels, prompts, BATCH, &|done| bar.set_position(done as u64));
    bar.finish_and_clear();
    Ok(made?.pictures)
}

/// What a model's pictures are compared with.
enum Reference {
    /// Another model's, and their labels.
    Model(Box<Source>, Vec<i64>),
    /// Real ones, and their labels.
    Pictures(Array4<f32>, Vec<i64>),
}

impl Reference {
    fn open(
        path: &Path,
        source: &Source,
        args: &ScoreArgs,
        prompts: &[String],
        threads: Option<usize>,
    ) -> Result<Self> {
        let (shape, classes) = (source.shape(), source.classes());
        if !(is_exported(path) || ModelFolder::is_at(path)) {
            let (images, labels) = pictures(path, shape, args.n, classes)?;
            return Ok(Reference::Pictures(images, labels));
        }
        let other = open(path, args, prompts, threads)?;
        ensure!(
            other.shape() == shape,
            "{}: makes pictures of {:?}, {} of {shape:?}",
            path.display(),
            other.shape(),
            args.model.display()
        );
        let (ours, theirs) = (classes.len(), other.classes().len());
        ensure!(
            ours == theirs,
            "{}: has {theirs} classes, {} has {ours}: the same classes are compared with each other",
            path.display(),
            args.model.display()
        );
        Ok(Reference::Model(Box::new(other), labels_in_turn(args.n, Some(ours).filter(|n| *n > 0))))
    }

    /// The labels of the pictures, all 0 where there are no classes, and the pictures.
    fn pictures(self, args: &ScoreArgs, prompts: &[String]) -> Result<(Vec<i64>, Array4<f32>)> {
        let (labels, images) = match self {
            Reference::Pictures(images, labels) => (labels, images),
            Reference::Model(mut source, labels) => {
                let images = draw(&mut source, Purpose::Reference, args.seed, args.n, (&labels, prompts))?;
                (labels, images)
            }
        };
        Ok(if labels.is_empty() { (vec![0; images.dim().0], images) } else { (labels, images) })
    }
}

/// At most `n` pictures of a data set, spread evenly over it, and the labels of the model's pictures to compare them with:
/// the same classes, or each in turn where the set has none.
pub fn pictures(path: &Path, [c, h, w]: [usize; 3], n: usize, classes: &[String]) -> Result<(Array4<f32>, Vec<i64>)> {
    let options = DataOptions::of_model([c, h, w], !classes.is_empty())?;
    let all = data::load_aloud(path, &options)?;
    let n = n.min(all.len());
    ensure!(n >= 2, "{}: has {n} picture, expected at least 2", path.display());
    let picks: Vec<usize> = (0..n).map(|i| i * all.len() / n).collect();
    let images = Array4::from_shape_vec((n, c, h, w), all.batch(&picks, &vec![false; n]).0)?;
    if classes.is_empty() {
        return Ok((images, Vec::new()));
    }
    let labels = match all.labels_of(path, classes)? {
        Some(labels) => picks.iter().map(|pick| i64::from(labels[*pick])).collect(),
        None => {
            say(&format!(
                "{}: has no class folders, the model's classes come in turn ({})",
                path.display(),
                listed(classes)
            ));
            labels_in_turn(n, Some(classes.len()))
        }
    };
    Ok((images, labels))
}

/// Pictures as scores see them.
struct Seen {
    /// In [0, 1], a picture a row.
    pixels: Array2<f32>,
    features: Option<Array2<f64>>,
}

impl Seen {
    fn new(images: Array4<f32>, features: Option<&mut Features>) -> Result<Self> {
        let bar = output::progress(images.dim().0 as u64, 0)?;
        let rows = features.map(|features| features.rows(&images, |done| bar.set_position(done as u64)));
        bar.finish_and_clear();
        Ok(Seen { pixels: as_rows(&images), features: rows.transpose()? })
    }
}

struct Score {
    /// Pictures of each.
    n: usize,
    sliced: Measured,
    kernel: Option<Measured>,
    /// Where there are more pictures than features.
    frechet: Option<Measured>,
    n_features: usize,
}

impl Score {
    fn new(found: &Seen, reference: &Seen, labels: &[i64]) -> Result<Self> {
        let (a, b, n) = (found.pixels.view(), reference.pixels.view(), labels.len());
        let directions = directions(a.ncols())?;
        let sliced = measure(
            n,
            labels,
            Floor::Mean(0.5),
            30,
            |counts| sliced_wasserstein_of(a, b, directions.view(), counts),
            |counts| sliced_wasserstein_of(b, b, directions.view(), counts),
        )?;
        let (mut kernel, mut frechet, mut n_features) = (None, None, 0);
        if let Some((a, b)) = found.features.as_ref().zip(reference.features.as_ref()) {
            let (a, b) = (a.view(), b.view());
            n_features = a.ncols();
            let within = |counts: &[_]| kernel_distance_of(b, b, counts);
            kernel = Some(measure(n, labels, Floor::Size, 30, |counts| kernel_distance_of(a, b, counts), within)?);
            if n > n_features {
                let within = |counts: &[_]| frechet_distance_of(b, b, counts);
                let between = |counts: &[_]| frechet_distance_of(a, b, counts);
                frechet = Some(measure(n, labels, Floor::Mean(1.0), 10, between, within)?);
            }
        }
        let all = [Some(sliced), kernel, frechet];
        ensure!(all.iter().flatten().all(|score| score.value.is_finite()), "a score is not a finite number");
        Ok(Score { n, sliced, kernel, frechet, n_features })
    }

    /// A line for each score.
    fn text(&self, against: &Path, features: Option<&Features>) -> String {
        let line = |name: &str, score: &Measured| {
            let floor = score.floor.map_or("not known".into(), |floor| format!("{floor:.5}"));
            format!("\n  {name:<24} {:>9.5} ± {:.5}   floor {floor}", score.value, 2.0 * score.standard_error)
        };
        let n = self.n;
        let mut text = format!("against {} ({n} pictures each; floor: two halves of the reference)", against.display());
        text += &line("sliced Wasserstein", &self.sliced);
        if let Some((kernel, features)) = self.kernel.as_ref().zip(features) {
            text += &line("kernel distance (KID)", kernel);
            match &self.frechet {
                Some(frechet) => text += &line("Fréchet distance (FID)", frechet),
                None => text += &format!("\n  {:<24} needs more pictures than features", "Fréchet distance (FID)"),
            }
            text += &format!("\n  by {} features: {}", self.n_features, features.text());
        }
        text
    }

    fn json(&self, against: &Path, features: Option<&Features>) -> Value {
        let mut found = json!({ "against": against, "pictures": self.n });
        let scores = [
            ("sliced_wasserstein", Some(&self.sliced)),
            ("kernel_distance", self.kernel.as_ref()),
            ("frechet_distance", self.frechet.as_ref()),
        ];
        for (name, score) in scores {
            found[name] = json!(score.map(|score| score.value));
            if let Some(score) = score {
                found[format!("{name}_interval")] = json!(score.interval());
                found[format!("{name}_floor")] = json!(score.floor);
            }
        }
        if let Some(features) = features {
            found["features"] = json!({ "dimension": self.n_features, "by": features.text() });
        }
        found
    }
}
