//! From prompts to pictures, by the folder that `dmd export --onnx DIR` writes: what reads prompts, the generator, what
//! makes pictures of its latents.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ndarray::Array4;

use crate::images::Pixels;
use crate::limits::{MAX_VALUES, room};
use crate::noise::{PICTURE_NOISE, Stream, refine};
use crate::request::Progress;
use crate::{
    Error, Feed, FolderInfo, Given, Images, Label, Module, Options, Port, PromptLimits, Request, Result, Values,
};

/// A model of several parts, ready to make pictures, from many threads at once.
///
/// ```no_run
/// use dmd_runtime::{Options, Pipeline, Request};
///
/// let pipeline = Pipeline::load("my-model", Options::default())?;
/// let images = pipeline.generate(&["a red apple, flat style"], &Request { seed: 7, ..Request::default() })?;
/// # Ok::<(), dmd_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct Pipeline {
    info: FolderInfo,
    tokenizers: Vec<Tokenizer>,
    text: Option<Module>,
    generator: Module,
    decoder: Option<Module>,
    /// What has been made of prompts: the values of each output of the text encoder.
    told: Mutex<HashMap<String, Arc<Vec<Vec<f32>>>>>,
}

/// Prompts that are remembered; more than these, and all are forgotten.
const REMEMBERED: usize = 64;

impl Pipeline {
    /// Opens a folder of `dmd export --onnx DIR`, whose parts run on the processor. A folder that takes prompts needs the
    /// feature `text`.
    pub fn load(folder: impl AsRef<Path>, options: Options) -> Result<Self> {
        let folder = folder.as_ref();
        let info = FolderInfo::read(folder)?;
        let open = |name: &str| info.part(name).map(|part| Module::load(folder.join(&part.file), options.clone()));
        let (text, decoder) = (open("text_encoder").transpose()?, open("decoder").transpose()?);
        let generator = open("generator").expect("the description was checked to have one")?;
        let tokenizers =
            info.prompts.iter().map(|limits| Tokenizer::load(folder, limits)).collect::<Result<Vec<_>>>()?;
        let pipeline = Self { info, tokenizers, text, generator, decoder, told: Mutex::default() };
        pipeline.check(folder)?;
        Ok(pipeline)
    }

    /// The parts must take what the ones before give.
    fn check(&self, folder: &Path) -> Result<()> {
        let refuse = |reason: String| Err(Error::Inconsistent { path: folder.into(), reason });
        let ids = self.text.as_ref().map_or(0, |text| text.info().inputs.len());
        if ids != self.tokenizers.len() {
            return refuse(format!(
                "its text encoder takes ids of {ids} tokenizers, {} are there",
                self.tokenizers.len()
            ));
        }
        let given: Vec<&Port> = self.text.iter().flat_map(|text| &text.info().outputs).collect();
        for port in &self.generator.info().inputs {
            let by_text = given.iter().any(|given| given.name == port.name && given.shape == port.shape);
            if !by_text && !["noise", "label", "row"].contains(&port.name.as_str()) {
                return refuse(format!("its generator takes {port:?}, the text encoder gives {given:?}"));
            }
        }
        let made = &self.generator.info().outputs[0].shape;
        match self.decoder.as_ref().map(|decoder| &decoder.info().inputs[0].shape) {
            Some(taken) if taken != made => {
                refuse(format!("its decoder takes latents of shape {taken:?}, the generator makes {made:?}"))
            }
            _ => Ok(()),
        }
    }

    /// What the folder says of itself.
    pub fn info(&self) -> &FolderInfo {
        &self.info
    }

    /// The prompts or classes that the generator chooses from, where they are part of its file.
    pub fn rows(&self) -> &[String] {
        &self.generator.info().classes
    }

    /// Makes the pictures `0 .. batch` of a seed, each by its prompt, or all by one. Where prompts are part of the file, they
    /// are chosen by their words, or as classes are by [`Request::labels`]; then there may be none, and pictures take them in
    /// turn.
    pub fn generate(&self, prompts: &[&str], request: &Request) -> Result<Images> {
        let n = request.batch;
        let rows = self.rows_of(prompts, request)?;
        let of_each = |port: &Port| port.shape.iter().skip(1).map(|side| side.unwrap_or(1)).product::<usize>();
        let (noise, last) = (&self.generator.info().inputs[0], self.decoder.as_ref().unwrap_or(&self.generator));
        let (values, most) = (of_each(noise), of_each(noise).max(of_each(&last.info().outputs[0])));
        match n.checked_mul(most) {
            Some(0) => return Err(Error::EmptyBatch),
            Some(total) if total <= MAX_VALUES => {}
            _ => return Err(Error::TooLarge { pictures: n, values: most, limit: MAX_VALUES }),
        }
        let sigmas = &self.generator.info().sigmas;
        let batch = self.generator.info().batch().unwrap_or(1);
        let total = n * (sigmas.len() + 1);
        let progress = |done| request.watch.as_ref().map_or(Ok(()), |watch| watch.report(Progress { done, total }));
        let mut pictures: Option<Given> = None;
        for first in (0..n).step_by(batch) {
            progress(first * (sigmas.len() + 1))?;
            let count = batch.min(n - first);
            // The rest of the last chunk is of the last picture's prompt, and is thrown away.
            let of = |i: usize| (first + i).min(n - 1);
            let told = self.told(prompts, (0..batch).map(of))?;
            let mut x = vec![0.0; batch * values];
            for (i, noise) in x.chunks_exact_mut(values).enumerate() {
                Stream::new(request.seed, PICTURE_NOISE, (first + i) as u64).fill_normal(noise);
            }
            for (pass, sigma) in sigmas.iter().enumerate() {
                if pass > 0 {
                    let before = std::mem::replace(&mut x, vec![0.0; batch * values]);
                    for (i, (input, sample)) in x.chunks_exact_mut(values).zip(before.chunks_exact(values)).enumerate()
                    {
                        refine(request.seed, pass, (first + i) as u64, sample, *sigma, input);
                    }
                }
                let index =
                    (0..batch).map(|i| (pass * self.rows().len().max(1) + rows.get(of(i)).unwrap_or(&0)) as i64);
                let made = self.pass(batch, &x, &told, &index.collect::<Vec<_>>())?;
                progress(first * (sigmas.len() + 1) + (pass + 1) * count)?;
                match made {
                    Given::F32(made) => x = made,
                    bytes => append(&mut pictures, bytes, count, batch),
                }
            }
            if self.decoder.is_some() || !matches!(pictures, Some(Given::U8(_))) {
                append(&mut pictures, self.decoded(batch, x)?, count, batch);
            }
        }
        let shape = &last.info().outputs[0].shape;
        let sides: Vec<usize> = shape.iter().skip(1).map(|side| side.unwrap_or(1)).collect();
        let [a, b, c] = sides[..] else {
            return Err(Error::Feed { reason: format!("its last part gives {shape:?}, expected pictures") });
        };
        const FITS: &str = "the parts give as many values as they say";
        progress(total)?;
        let pixels = match pictures.ok_or(Error::EmptyBatch)? {
            Given::F32(values) => match values.chunks(a * b * c).position(|one| !one.iter().all(|x| x.is_finite())) {
                Some(picture) => return Err(Error::NotFinite { picture }),
                None => Pixels::F32(Array4::from_shape_vec((n, a, b, c), values).expect(FITS)),
            },
            Given::U8(values) => Pixels::U8(Array4::from_shape_vec((n, a, b, c), values).expect(FITS)),
        };
        Ok(Images::new(pixels, rows))
    }

    /// One pass of the generator.
    fn pass(&self, batch: usize, x: &[f32], told: &[Vec<f32>], index: &[i64]) -> Result<Given> {
        let inputs = &self.generator.info().inputs;
        let shapes: Vec<Vec<usize>> =
            inputs.iter().map(|port| port.shape.iter().map(|side| side.unwrap_or(batch)).collect()).collect();
        let outputs = self.text.as_ref().map_or(&[][..], |text| &text.info().outputs);
        let values = |name: &str| match outputs.iter().position(|output| output.name == name) {
            Some(at) => Values::F32(&told[at]),
            None if name == "noise" => Values::F32(x),
            None => Values::I64(index),
        };
        let feeds = inputs.iter().zip(&shapes).map(|(port, shape)| Feed {
            name: &port.name,
            shape,
            values: values(&port.name),
        });
        Ok(self.generator.run(&feeds.collect::<Vec<_>>())?.swap_remove(0))
    }

    fn decoded(&self, batch: usize, latents: Vec<f32>) -> Result<Given> {
        let Some(decoder) = &self.decoder else { return Ok(Given::F32(latents)) };
        let port = &decoder.info().inputs[0];
        let shape: Vec<usize> = port.shape.iter().map(|side| side.unwrap_or(batch)).collect();
        let feed = Feed { name: &port.name, shape: &shape, values: Values::F32(&latents) };
        Ok(decoder.run(&[feed])?.swap_remove(0))
    }

    /// What the generator is told of some pictures' prompts: the values of each output of the text encoder.
    fn told(&self, prompts: &[&str], pictures: impl Iterator<Item = usize>) -> Result<Vec<Vec<f32>>> {
        let Some(text) = &self.text else { return Ok(vec![]) };
        let mut told = vec![Vec::new(); text.info().outputs.len()];
        for i in pictures {
            let prompt = *one_of(prompts, i).ok_or(Error::NoPrompt)?;
            let known = self.told.lock().unwrap_or_else(PoisonError::into_inner).get(prompt).cloned();
            let of_prompt = match known {
                Some(known) => known,
                None => self.encode(text, prompt)?,
            };
            told.iter_mut().zip(of_prompt.iter()).for_each(|(all, one)| all.extend_from_slice(one));
        }
        Ok(told)
    }

    /// Runs the text encoder on one prompt, in every place of its batch.
    fn encode(&self, text: &Module, prompt: &str) -> Result<Arc<Vec<Vec<f32>>>> {
        let batch = text.info().batch().unwrap_or(1);
        let ids = self.tokenizers.iter().map(|tokenizer| Ok(tokenizer.ids(prompt)?.repeat(batch)));
        let ids = ids.collect::<Result<Vec<Vec<i32>>>>()?;
        let shapes: Vec<[usize; 2]> = ids.iter().map(|ids| [batch, ids.len() / batch]).collect();
        let inputs = text.info().inputs.iter().zip(&ids).zip(&shapes);
        let feeds = inputs.map(|((port, ids), shape)| Feed { name: &port.name, shape, values: Values::I32(ids) });
        let given = text.run(&feeds.collect::<Vec<_>>())?;
        let first = |given: Given| match given {
            Given::F32(mut values) => {
                values.truncate(values.len() / batch);
                values
            }
            Given::U8(_) => vec![],
        };
        let told = Arc::new(given.into_iter().map(first).collect::<Vec<_>>());
        let mut remembered = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED {
            remembered.clear();
        }
        remembered.insert(prompt.into(), told.clone());
        Ok(told)
    }

    /// The row of each picture; none where the generator has no rows.
    fn rows_of(&self, prompts: &[&str], request: &Request) -> Result<Vec<usize>> {
        let (names, n) = (self.rows(), request.batch);
        let counts = [prompts.len(), request.labels.len()];
        if ![0, 1, n].contains(&counts[0]) {
            return Err(Error::Feed { reason: format!("found {} prompts, expected 1 or {n}", counts[0]) });
        }
        if ![0, 1, n].contains(&counts[1]) {
            return Err(Error::LabelCount { found: counts[1], expected: format!("none, 1 or {n}") });
        }
        let takes_prompts = self.text.is_some() || !names.is_empty();
        if counts[0] > 0 && !takes_prompts {
            return Err(Error::NotPrompted { prompt: self.generator.info().fixed_class.clone() });
        }
        if self.text.is_some() && counts[0] == 0 {
            return Err(Error::NoPrompt);
        }
        if names.is_empty() {
            return if counts[1] > 0 { Err(Error::NotLabelled) } else { Ok(vec![]) };
        }
        let mut rows = room(n)?;
        let unknown = |name: &str| Error::NoSuchClass { name: name.into(), classes: names.to_vec() };
        let of_name = |name: &str| names.iter().position(|known| known == name);
        for i in 0..n {
            rows.push(match (one_of(prompts, i), one_of(&request.labels, i)) {
                (Some(prompt), _) => of_name(prompt)
                    .ok_or_else(|| Error::NoSuchPrompt { prompt: prompt.to_string(), prompts: names.to_vec() })?,
                (None, Some(Label::Name(name))) => of_name(name).ok_or_else(|| unknown(name))?,
                (None, Some(Label::Index(label))) if *label < names.len() => *label,
                (None, Some(Label::Index(label))) => {
                    let label = i64::try_from(*label).unwrap_or(i64::MAX);
                    return Err(Error::Label { label, classes: names.len() });
                }
                (None, None) => i % names.len(),
            });
        }
        Ok(rows)
    }
}

/// One for each, or one for all.
fn one_of<T>(all: &[T], i: usize) -> Option<&T> {
    if all.len() == 1 { all.first() } else { all.get(i) }
}

/// Adds the first `count` of `batch` pictures.
fn append(all: &mut Option<Given>, given: Given, count: usize, batch: usize) {
    match (all, given) {
        (Some(Given::F32(all)), Given::F32(values)) => all.extend(&values[..values.len() / batch * count]),
        (Some(Given::U8(all)), Given::U8(values)) => all.extend(&values[..values.len() / batch * count]),
        (all, Given::F32(mut values)) => {
            values.truncate(values.len() / batch * count);
            *all = Some(Given::F32(values));
        }
        (all, Given::U8(mut values)) => {
            values.truncate(values.len() / batch * count);
            *all = Some(Given::U8(values));
        }
    }
}

/// Prompts to ids.
#[derive(Debug)]
struct Tokenizer {
    #[cfg(feature = "text")]
    inner: tokenizers::Tokenizer,
    #[cfg(feature = "text")]
    limits: PromptLimits,
}

#[cfg(not(feature = "text"))]
impl Tokenizer {
    fn load(_: &Path, _: &PromptLimits) -> Result<Self> {
        Err(Error::NoTokenizer)
    }

    fn ids(&self, _: &str) -> Result<Vec<i32>> {
        Err(Error::NoTokenizer)
    }
}

#[cfg(feature = "text")]
impl Tokenizer {
    fn load(folder: &Path, limits: &PromptLimits) -> Result<Self> {
        let path = folder.join(&limits.tokenizer);
        let refuse = |reason: String| Error::Inconsistent { path: path.clone(), reason };
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        // It panics on pairs that make no token.
        let read = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes));
        let read = read.map_err(|_| refuse("is no tokenizer: its pairs make no tokens of its vocabulary".into()))?;
        let inner = read.map_err(|error| refuse(format!("is no tokenizer: {error}")))?;
        if !(3..=MAX_TOKENS).contains(&limits.tokens) {
            return Err(refuse(format!("has prompts of {} tokens, expected 3 to {MAX_TOKENS}", limits.tokens)));
        }
        Ok(Tokenizer { inner, limits: limits.clone() })
    }

    /// Ids of a prompt, framed, cut and filled up; what is cut is logged.
    fn ids(&self, prompt: &str) -> Result<Vec<i32>> {
        let PromptLimits { begin, end, padding, tokens, .. } = self.limits;
        let failed = |error| Error::Feed { reason: format!("the prompt {prompt:?} has no tokens: {error}") };
        let encoded = self.inner.encode(prompt, false).map_err(failed)?;
        let room = tokens - 2;
        if let Some((start, _)) = encoded.get_offsets().get(room) {
            let left_out = prompt.get(*start..).unwrap_or_default();
            log::warn!("a prompt has more than the {room} tokens that are read; left out: {left_out:?}");
        }
        let own = encoded.get_ids().iter().take(room).copied();
        let mut ids: Vec<i32> = std::iter::once(begin).chain(own).chain([end]).map(|id| id as i32).collect();
        ids.resize(tokens, padding as i32);
        Ok(ids)
    }
}

/// The most tokens of a prompt.
#[cfg(feature = "text")]
const MAX_TOKENS: usize = 1 << 16;
