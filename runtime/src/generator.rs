//! A loaded file: noise and labels in, pictures out, in chunks of the batch that the graph was made for.

use std::path::{Path, PathBuf};

use ndarray::{Array4, ArrayView4, ArrayViewMut3};

use crate::contract::Source;
use crate::engine::{self, Engine, Feed, Out, Values};
use crate::images::Pixels;
use crate::limits::{MAX_VALUES, room, zeros};
use crate::noise::{PICTURE_NOISE, Stream, refine};
use crate::{EngineChoice, EngineInfo, Error, Images, Info, Output, Result};

/// A generator ready to make pictures.
///
/// ```no_run
/// use dmd_runtime::{Generator, Options, Request};
///
/// let mut generator = Generator::load("emoji-32.onnx", Options::default())?;
/// if let Some(warning) = &generator.engine().warning {
///     eprintln!("{warning}");
/// }
/// let images = generator.generate(&Request { seed: 1, labels: vec![], batch: 16 })?;
/// assert_eq!(images.to_u8().dim(), (16, 32, 32, 3));
/// # Ok::<(), dmd_runtime::Error>(())
/// ```
pub struct Generator {
    info: Info,
    engine_info: EngineInfo,
    engine: Box<dyn Engine>,
    /// The engine's inputs, reused from call to call: `(B, C, H, W)` and, where the graph has an index, `(B)`.
    noise: Vec<f32>,
    index: Vec<i64>,
}

/// How a file is run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Which engine runs it.
    pub engine: EngineChoice,
    /// ONNX Runtime's library, or the folder that holds it; `None` searches, see [`library`](crate::library).
    pub library: Option<PathBuf>,
    /// Threads within one operator; `None` or 0 for as many as the machine offers. More than four for each core are not
    /// taken, and [`EngineInfo::warning`] says so.
    pub threads: Option<usize>,
}

/// Which pictures to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Picture `i` depends on the seed, on `i` and on its label, not on the batch it is made in.
    pub seed: u64,
    /// One class for all pictures, or one for each. Empty: a generator with classes cycles through them.
    pub labels: Vec<usize>,
    /// The number of pictures, which may differ from the file's own batch.
    pub batch: usize,
}

impl Default for Request {
    /// One picture of seed 0.
    fn default() -> Self {
        Self { seed: 0, labels: Vec::new(), batch: 1 }
    }
}

impl Generator {
    /// Opens a file that `dmd export --onnx` or `dmd ort` wrote. Only ONNX Runtime runs `.ort` files.
    pub fn load(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        Self::open(Source::File(path.as_ref()), &options)
    }

    /// Opens such a file's bytes, as an app has them of its own: an asset, or `include_bytes!`. Its weights must be in it.
    ///
    /// ```no_run
    /// use dmd_runtime::{Generator, Options};
    ///
    /// let mut generator = Generator::from_bytes(&std::fs::read("emoji-32.onnx")?, Options::default())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_bytes(bytes: &[u8], options: Options) -> Result<Self> {
        Self::open(Source::Bytes(bytes), &options)
    }

    fn open(source: Source<'_>, options: &Options) -> Result<Self> {
        let info = Info::of(source)?;
        let noise = zeros(info.batch * info.values())?;
        let index = zeros(if info.index().is_some() { info.batch } else { 0 })?;
        let (engine, engine_info) = engine::open(source, &info, options)?;
        Ok(Self { info, engine_info, engine, noise, index })
    }

    /// What the file says of itself.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// What runs it.
    pub fn engine(&self) -> &EngineInfo {
        &self.engine_info
    }

    /// Makes the pictures `0 .. batch` of a seed.
    pub fn generate(&mut self, request: &Request) -> Result<Images> {
        let labels = self.request_labels(request)?;
        let seed = request.seed;
        self.run_chunks(request.batch, labels, seed, |picture, noise| {
            Stream::new(seed, PICTURE_NOISE, picture as u64).fill_normal(noise);
        })
    }

    /// Makes pictures of the caller's own unit normal noise `(N, C, H, W)`, for any `N`. A generator with classes
    /// takes `N` labels, another none. One of several passes draws what it adds between them from seed 0;
    /// [`run_seeded`](Self::run_seeded) from another.
    pub fn run(&mut self, noise: ArrayView4<'_, f32>, labels: &[i64]) -> Result<Images> {
        self.run_seeded(noise, labels, 0)
    }

    /// Makes pictures as [`run`](Self::run) does, with the seed of the noise between the passes. The noise of a seed
    /// ([`picture_noise`](crate::picture_noise)) makes the pictures that [`generate`](Self::generate) makes of it.
    pub fn run_seeded(&mut self, noise: ArrayView4<'_, f32>, labels: &[i64], seed: u64) -> Result<Images> {
        let shape = self.info.shape();
        if noise.shape()[1..] != shape {
            return Err(Error::NoiseShape { found: noise.shape().to_vec(), expected: shape });
        }
        if let Some(picture) = noise.outer_iter().position(|picture| !picture.iter().all(|x| x.is_finite())) {
            return Err(Error::NoiseNotFinite { picture });
        }
        let expected = if self.info.labelled() { noise.dim().0 } else { 0 };
        if labels.len() != expected {
            return Err(match self.info.labelled() {
                true => Error::LabelCount { found: labels.len(), expected: format!("one per picture, {expected}") },
                false => Error::NotLabelled,
            });
        }
        let labels = labels.iter().map(|label| self.check_label(*label)).collect::<Result<_>>()?;
        self.run_chunks(noise.dim().0, labels, seed, |picture, values| {
            let mut values = ArrayViewMut3::from_shape(shape, values).expect("the chunk holds one picture's values");
            values.assign(&noise.index_axis(ndarray::Axis(0), picture));
        })
    }

    /// Runs the engine for one pass on the inputs of its last call, which after loading are zeros, and throws its output away:
    /// the bare call, to measure an engine by, and what [`generate`](Self::generate) adds to it.
    pub fn run_engine(&mut self) -> Result<()> {
        let mut nowhere = Buffer::zeros(self.info.output, 0)?;
        let run = self.engine.run(&feeds(&self.info, &self.noise, &self.index), nowhere.part(0, 0));
        run.map_err(|reason| Error::Run { engine: self.engine_info.kind, reason })
    }

    fn request_labels(&self, request: &Request) -> Result<Vec<usize>> {
        let (given, n) = (&request.labels, request.batch);
        self.check_size(n)?;
        if !self.info.labelled() {
            return if given.is_empty() { Ok(Vec::new()) } else { Err(Error::NotLabelled) };
        }
        given.iter().try_for_each(|label| self.check_label(*label as i64).map(drop))?;
        if ![0, 1, n].contains(&given.len()) {
            return Err(Error::LabelCount { found: given.len(), expected: format!("none, 1 or {n}") });
        }
        let mut labels = room(n)?;
        match given.as_slice() {
            [] => labels.extend((0..n).map(|i| i % self.info.classes.len())),
            given => labels.extend(given.iter().cycle().take(n)),
        }
        Ok(labels)
    }

    /// Pictures in one call where the file leaves their number free: enough to fill a machine, few enough for its memory.
    fn dynamic_chunk(&self) -> usize {
        (MAX_VALUES / self.info.file.largest_value.max(1)).clamp(1, 32)
    }

    fn check_label(&self, label: i64) -> Result<usize> {
        let classes = self.info.classes.len();
        usize::try_from(label).ok().filter(|l| *l < classes).ok_or(Error::Label { label, classes })
    }

    fn check_size(&self, pictures: usize) -> Result<()> {
        let values = self.info.values();
        match pictures.checked_mul(values) {
            Some(0) => Err(Error::EmptyBatch),
            Some(total) if total <= MAX_VALUES => Ok(()),
            _ => Err(Error::TooLarge { pictures, values, limit: MAX_VALUES }),
        }
    }

    /// Runs `n` pictures in chunks of the file's batch, each chunk through all passes; `fill` writes the noise of one.
    /// The rest of the last chunk is zero noise and label 0, and is thrown away. Where the batch is free, chunks are as
    /// large as may be.
    fn run_chunks(
        &mut self,
        n: usize,
        labels: Vec<usize>,
        seed: u64,
        mut fill: impl FnMut(usize, &mut [f32]),
    ) -> Result<Images> {
        self.check_size(n)?;
        let (values, classes) = (self.info.values(), self.info.classes.len().max(1));
        let mut pixels = Buffer::zeros(self.info.output, n * values)?;
        let chunk = if self.info.dynamic_batch { n.min(self.dynamic_chunk()) } else { self.info.batch };
        for first in (0..n).step_by(chunk) {
            let count = chunk.min(n - first);
            if self.info.dynamic_batch {
                self.noise.resize(count * values, 0.0);
                self.index.resize(if self.info.index().is_some() { count } else { 0 }, 0);
            }
            let (noise, padding) = self.noise.split_at_mut(count * values);
            noise.chunks_exact_mut(values).enumerate().for_each(|(i, picture)| fill(first + i, picture));
            padding.fill(0.0);
            for (pass, sigma) in self.info.sigmas.iter().enumerate() {
                if pass > 0 {
                    let inputs = self.noise.chunks_exact_mut(values).zip(pixels.pictures(first, values));
                    for (i, (input, picture)) in inputs.take(count).enumerate() {
                        refine(seed, pass, (first + i) as u64, picture, *sigma, input);
                    }
                }
                for (i, row) in self.index.iter_mut().enumerate() {
                    *row = (pass * classes + labels.get(first + i).filter(|_| i < count).unwrap_or(&0)) as i64;
                }
                let feeds = feeds(&self.info, &self.noise, &self.index);
                let run = self.engine.run(&feeds, pixels.part(first * values, count * values));
                run.map_err(|reason| Error::Run { engine: self.engine_info.kind, reason })?;
            }
        }
        pixels.check_finite(values)?;
        Ok(Images::new(pixels.into_pixels(n, self.info.shape()), labels))
    }
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("info", &self.info).field("engine", &self.engine_info).finish_non_exhaustive()
    }
}

/// What a call gives the graph, by the names of its inputs.
fn feeds<'a>(info: &Info, noise: &'a [f32], index: &'a [i64]) -> Vec<Feed<'a>> {
    let shape = vec![noise.len() / info.values(), info.channels, info.height, info.width];
    let mut feeds = vec![Feed { name: "noise", shape, values: Values::F32(noise) }];
    feeds.extend(info.index().map(|name| Feed { name, shape: vec![index.len()], values: Values::I64(index) }));
    feeds
}

/// Where the engine writes.
enum Buffer {
    F32(Vec<f32>),
    U8(Vec<u8>),
}

impl Buffer {
    fn zeros(output: Output, n: usize) -> Result<Self> {
        Ok(match output {
            Output::F32 => Self::F32(zeros(n)?),
            Output::U8 => Self::U8(zeros(n)?),
        })
    }

    fn part(&mut self, start: usize, n: usize) -> Out<'_> {
        match self {
            Self::F32(values) => Out::F32(&mut values[start..start + n]),
            Self::U8(values) => Out::U8(&mut values[start..start + n]),
        }
    }

    /// The pictures from `first` on, so far; none where they are bytes, from which no pass goes on.
    fn pictures(&self, first: usize, values: usize) -> std::slice::ChunksExact<'_, f32> {
        match self {
            Self::F32(all) => all[first * values..].chunks_exact(values),
            Self::U8(_) => [].chunks_exact(values),
        }
    }

    fn check_finite(&self, per_picture: usize) -> Result<()> {
        let Self::F32(values) = self else { return Ok(()) };
        let broken = |picture: &[f32]| !picture.iter().all(|x| x.is_finite());
        match values.chunks_exact(per_picture).position(broken) {
            Some(picture) => Err(Error::NotFinite { picture }),
            None => Ok(()),
        }
    }

    fn into_pixels(self, n: usize, [channels, height, width]: [usize; 3]) -> Pixels {
        const FITS: &str = "the buffer was made for this shape";
        match self {
            Self::F32(values) => Pixels::F32(Array4::from_shape_vec((n, channels, height, width), values).expect(FITS)),
            Self::U8(values) => Pixels::U8(Array4::from_shape_vec((n, height, width, channels), values).expect(FITS)),
        }
    }
}
