//! A loaded file: noise and labels in, pictures out, in chunks of the batch that the graph was made for.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ndarray::{Array4, ArrayView4, ArrayViewMut3};

use crate::contract::Source;
use crate::engine::placing::{Placing, Running};
use crate::engine::{Engine, Feed, Out, Values};
use crate::images::{Buffer, Pixels, Raw, write};
use crate::limits::{MAX_VALUES, resize, room, zeros};
use crate::noise::{PICTURE_NOISE, Stream, refine};
use crate::request::{Label, Progress};
use crate::{Accelerator, EngineChoice, EngineInfo, Error, Images, Info, Output, Placement, Request, Result, Watch};

/// A generator ready to make pictures, from as many threads at once as there are: each call has memory of its own, and no
/// lock is held while the engine runs.
///
/// ```no_run
/// use dmd_runtime::{Generator, Options, Request};
///
/// let generator = Generator::load("emoji-32.onnx", Options::default())?;
/// if let Some(warning) = &generator.engine().warning {
///     eprintln!("{warning}");
/// }
/// let images = generator.generate(&Request { seed: 1, batch: 16, ..Request::default() })?;
/// assert_eq!(images.to_u8().dim(), (16, 32, 32, 3));
/// # Ok::<(), dmd_runtime::Error>(())
/// ```
pub struct Generator {
    info: Info,
    engine_info: EngineInfo,
    placing: Placing,
    /// What runs the file: for all of its life, unless an accelerator fails.
    running: RwLock<Arc<Running>>,
    /// Memory that calls are done with, for the next ones: as many as ran at once.
    pool: Mutex<Vec<Scratch>>,
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
    /// What may run the graph in the place of the processor, in the order in which they are asked. One is taken that has a
    /// device, takes the file and a node of it at least, and makes the picture that the processor makes; that takes a second
    /// load of the file and a run of each. [`Generator::placement`] tells which, and why not the others. When it fails
    /// later, that call is an error, and the next one goes on along the list. The processor stands behind the list.
    pub accelerators: Vec<Accelerator>,
    /// Whether an accelerator of the list must run every node: otherwise the processor runs what they leave, or all.
    pub require_accelerator: bool,
    /// Whether ONNX Runtime is to hold less memory, for a quarter more time: it keeps the weights as the file has them, and
    /// gives back after a call what the call took. Weights beside the file (`dmd export --external-data`) then stay there,
    /// and are mapped. tract has no such choice.
    pub low_memory: bool,
}

impl Generator {
    /// Opens a file that `dmd export --onnx` or `dmd ort` wrote. Only ONNX Runtime runs `.ort` files.
    pub fn load(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        Self::open(Source::File(path.as_ref()), options)
    }

    /// Opens such a file's bytes, as an app has them of its own: an asset, or `include_bytes!`. Its weights must be in it.
    /// The bytes are not needed any more afterwards.
    ///
    /// ```no_run
    /// use dmd_runtime::{Generator, Options};
    ///
    /// let generator = Generator::from_bytes(&std::fs::read("emoji-32.onnx")?, Options::default())?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_bytes(bytes: &[u8], options: Options) -> Result<Self> {
        Self::open(Source::Bytes(bytes), options)
    }

    /// Opens such a file by a memory map: no copy of it is made while it is read, and what is checked is what the engine
    /// gets. ONNX Runtime leaves the weights of an `.ort` file in the map for as long as the generator lives: the system
    /// then reads them when they are needed, shares them between processes and drops them where memory is short. Any other
    /// file is unmapped before this returns. Weights must be in the file; those beside it ([`load`](Self::load)) are mapped
    /// by ONNX Runtime itself.
    ///
    /// # Safety
    ///
    /// Nobody may write to the file or shorten it while it is mapped, in this process or another: what was checked would no
    /// longer be what runs, and a read beyond a new end ends the process. Files in an app's own package are safe.
    pub unsafe fn map(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        let path = path.as_ref();
        let io = |source| Error::Io { path: path.into(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        // SAFETY: the caller promises that the file stays as it is.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Self::open(Source::Map(path, &Arc::new(map)), options)
    }

    fn open(source: Source<'_>, options: Options) -> Result<Self> {
        let info = Info::of(source)?;
        let (placing, running) = Placing::open(source, &info, options)?;
        Self::new(info, placing, running)
    }

    pub(crate) fn new(info: Info, placing: Placing, running: Arc<Running>) -> Result<Self> {
        let scratch = Scratch::new(&info)?;
        let engine_info = running.engine_info.clone();
        Ok(Self { info, engine_info, placing, running: RwLock::new(running), pool: Mutex::new(vec![scratch]) })
    }

    /// What the file says of itself.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// What runs it.
    pub fn engine(&self) -> &EngineInfo {
        &self.engine_info
    }

    /// What runs where for now, and why there.
    pub fn placement(&self) -> Placement {
        self.running.read().unwrap_or_else(PoisonError::into_inner).placement.clone()
    }

    /// Makes the pictures `0 .. batch` of a seed.
    pub fn generate(&self, request: &Request) -> Result<Images> {
        self.check(request)?;
        let n_labels = if self.info.labelled() { request.batch } else { 0 };
        let mut labels = room(n_labels)?;
        for i in 0..n_labels {
            labels.push(self.label_of(request, i)?);
        }
        self.images(request.batch, labels, |into| self.fulfil(request, into))
    }

    /// Makes the pictures `0 .. batch` of a seed in the caller's memory, which must hold them and no more. From the second
    /// call with as many pictures on it allocates nothing itself; what the engine does is the engine's.
    ///
    /// ```no_run
    /// use dmd_runtime::{Buffer, Generator, Options, Request};
    ///
    /// let generator = Generator::load("emoji-32.onnx", Options::default())?;
    /// let mut pixels = vec![0; 32 * 32 * 4];
    /// generator.generate_into(&Request::default(), Buffer::Rgba(&mut pixels))?;
    /// # Ok::<(), dmd_runtime::Error>(())
    /// ```
    pub fn generate_into(&self, request: &Request, into: Buffer<'_>) -> Result<()> {
        self.check(request)?;
        into.check(request.batch, self.info.shape())?;
        self.fulfil(request, into)
    }

    /// Makes pictures of the caller's own unit normal noise `(N, C, H, W)`, for any `N`. A generator with classes
    /// takes `N` labels, another none. One of several passes draws what it adds between them from seed 0;
    /// [`run_seeded`](Self::run_seeded) from another.
    pub fn run(&self, noise: ArrayView4<'_, f32>, labels: &[i64]) -> Result<Images> {
        self.run_seeded(noise, labels, 0)
    }

    /// Makes pictures as [`run`](Self::run) does, with the seed of the noise between the passes. The noise of a seed
    /// ([`picture_noise`](crate::picture_noise)) makes the pictures that [`generate`](Self::generate) makes of it.
    pub fn run_seeded(&self, noise: ArrayView4<'_, f32>, labels: &[i64], seed: u64) -> Result<Images> {
        let shape = self.info.shape();
        if noise.shape()[1..] != shape {
            return Err(Error::NoiseShape { found: noise.shape().to_vec(), expected: shape });
        }
        if let Some(picture) = noise.outer_iter().position(|picture| !picture.iter().all(|x| x.is_finite())) {
            return Err(Error::NoiseNotFinite { picture });
        }
        let n = noise.dim().0;
        let expected = if self.info.labelled() { n } else { 0 };
        if labels.len() != expected {
            return Err(match self.info.labelled() {
                true => Error::LabelCount { found: labels.len(), expected: format!("one per picture, {expected}") },
                false => Error::NotLabelled,
            });
        }
        let labels: Vec<usize> = labels.iter().map(|label| self.check_label(*label)).collect::<Result<_>>()?;
        self.check_size(n)?;
        self.images(n, labels.clone(), |into| {
            let label = |i: usize| Ok(labels.get(i).copied().unwrap_or(0));
            let fill = |picture, values: &mut [f32]| {
                let mut values =
                    ArrayViewMut3::from_shape(shape, values).expect("the chunk holds one picture's values");
                values.assign(&noise.index_axis(ndarray::Axis(0), picture));
            };
            self.make(n, seed, None, label, fill, into)
        })
    }

    /// Runs the engine once, for one pass of one call, on the inputs of a call before (zeros after loading), and throws the
    /// output away: so that the first picture need not wait for what an engine does once. This is the bare call, too, to
    /// measure an engine by, and what [`generate`](Self::generate) adds to it.
    pub fn warm_up(&self) -> Result<()> {
        let running = self.running()?;
        self.with_scratch(|scratch| {
            if scratch.noise.is_empty() {
                scratch.resize(self.info.batch, &self.info)?;
            }
            self.run_engine(&running, scratch)
        })
    }

    /// Whether a request can be fulfilled.
    fn check(&self, request: &Request) -> Result<()> {
        self.check_size(request.batch)?;
        let (given, n) = (request.labels.len(), request.batch);
        if !self.info.labelled() && given > 0 {
            return Err(Error::NotLabelled);
        }
        request.labels.iter().try_for_each(|label| self.resolve(label).map(drop))?;
        match [0, 1, n].contains(&given) {
            true => Ok(()),
            false => Err(Error::LabelCount { found: given, expected: format!("none, 1 or {n}") }),
        }
    }

    /// The label of picture `i`: 0 where there are no classes, each class in turn where none is asked for.
    fn label_of(&self, request: &Request, i: usize) -> Result<usize> {
        match request.labels.as_slice() {
            [] => Ok(i % self.info.classes.len().max(1)),
            [label] => self.resolve(label),
            labels => self.resolve(&labels[i]),
        }
    }

    fn resolve(&self, label: &Label) -> Result<usize> {
        match label {
            Label::Index(label) => self.check_label(i64::try_from(*label).unwrap_or(i64::MAX)),
            Label::Name(name) => self
                .info
                .class(name)
                .ok_or_else(|| Error::NoSuchClass { name: name.clone(), classes: self.info.classes.clone() }),
        }
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

    /// New pictures as the file gives them, written by `make`.
    fn images(&self, n: usize, labels: Vec<usize>, make: impl FnOnce(Buffer<'_>) -> Result<()>) -> Result<Images> {
        const FITS: &str = "the buffer was made for this shape";
        let [channels, height, width] = self.info.shape();
        let values = n * self.info.values();
        let pixels = match self.info.output {
            Output::F32 => {
                let mut pixels = zeros(values)?;
                make(Buffer::F32(&mut pixels))?;
                Pixels::F32(Array4::from_shape_vec((n, channels, height, width), pixels).expect(FITS))
            }
            Output::U8 => {
                let mut pixels = zeros(values)?;
                make(Buffer::U8(&mut pixels))?;
                Pixels::U8(Array4::from_shape_vec((n, height, width, channels), pixels).expect(FITS))
            }
        };
        Ok(Images::new(pixels, labels))
    }

    fn fulfil(&self, request: &Request, into: Buffer<'_>) -> Result<()> {
        let Request { seed, batch, watch, .. } = request;
        let label = |i| self.label_of(request, i);
        let fill = |picture, noise: &mut [f32]| Stream::new(*seed, PICTURE_NOISE, picture as u64).fill_normal(noise);
        self.make(*batch, *seed, watch.as_ref(), label, fill, into)
    }

    /// Runs `n` pictures in chunks of the file's batch, each chunk through all passes; `fill` writes the noise of one.
    /// The rest of the last chunk is zero noise and label 0, and is thrown away. Where the batch is free, chunks are as
    /// large as may be.
    fn make(
        &self,
        n: usize,
        seed: u64,
        watch: Option<&Watch>,
        label: impl Fn(usize) -> Result<usize>,
        fill: impl Fn(usize, &mut [f32]),
        mut into: Buffer<'_>,
    ) -> Result<()> {
        let (values, classes) = (self.info.values(), self.info.classes.len().max(1));
        let chunk = if self.info.dynamic_batch { n.min(self.dynamic_chunk()) } else { self.info.batch };
        let total = n * self.info.passes();
        let progress = |done| watch.map_or(Ok(()), |watch| watch.report(Progress { done, total }));
        progress(0)?;
        let running = self.running()?;
        self.with_scratch(|scratch| {
            for first in (0..n).step_by(chunk) {
                let count = chunk.min(n - first);
                scratch.resize(if self.info.dynamic_batch { count } else { chunk }, &self.info)?;
                let (noise, padding) = scratch.noise.split_at_mut(count * values);
                noise.chunks_exact_mut(values).enumerate().for_each(|(i, picture)| fill(first + i, picture));
                padding.fill(0.0);
                for (pass, sigma) in self.info.sigmas.iter().enumerate() {
                    if pass > 0 {
                        scratch.refine(seed, pass, first, *sigma, values, count);
                    }
                    for (i, row) in scratch.index.iter_mut().enumerate() {
                        let label = if i < count { label(first + i)? } else { 0 };
                        *row = (pass * classes + label) as i64;
                    }
                    self.run_engine(&running, scratch)?;
                    progress(first * self.info.passes() + (pass + 1) * count)?;
                }
                let pictures = scratch.pictures.leading(count * values);
                if let Some(picture) = first_not_finite(pictures, values) {
                    return Err(Error::NotFinite { picture: first + picture });
                }
                write(pictures, self.info.shape(), into.part(first, count, self.info.shape()));
            }
            Ok(())
        })
    }

    /// Pictures in one call where the file leaves their number free: enough to fill a machine, few enough for its memory.
    fn dynamic_chunk(&self) -> usize {
        (MAX_VALUES / self.info.file.largest_value.max(1)).clamp(1, 32)
    }

    /// What runs the file; after a failure of an accelerator, the next that is proven.
    fn running(&self) -> Result<Arc<Running>> {
        let running = self.running.read().unwrap_or_else(PoisonError::into_inner).clone();
        if !running.has_failed() {
            return Ok(running);
        }
        let mut running = self.running.write().unwrap_or_else(PoisonError::into_inner);
        if running.has_failed() {
            *running = self.placing.after(&running)?;
        }
        Ok(running.clone())
    }

    fn run_engine(&self, running: &Running, scratch: &mut Scratch) -> Result<()> {
        scratch
            .run(&*running.engine, &self.info)
            .map_err(|reason| Error::Run { engine: self.engine_info.kind, reason: running.fail(reason) })
    }

    /// Lends a call memory of its own. A call that fails or panics may leave it as it is: each writes what it reads.
    fn with_scratch<T>(&self, call: impl FnOnce(&mut Scratch) -> Result<T>) -> Result<T> {
        let free = || self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let free_scratch = free().pop();
        let mut scratch = free_scratch.unwrap_or_else(|| Scratch::of(self.info.output));
        let result = call(&mut scratch);
        free().push(scratch);
        result
    }
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator")
            .field("info", &self.info)
            .field("placement", &self.placement())
            .finish_non_exhaustive()
    }
}

/// What one call of the engine reads and writes, reused from call to call: `(B, C, H, W)`, where the graph has an index
/// `(B)`, and pictures.
#[derive(Clone)]
pub(crate) struct Scratch {
    pub noise: Vec<f32>,
    pub index: Vec<i64>,
    pictures: Pictures,
}

/// Pictures as the engine writes them.
#[derive(Clone)]
enum Pictures {
    F32(Vec<f32>),
    U8(Vec<u8>),
}

impl Scratch {
    /// Room for one call.
    pub fn new(info: &Info) -> Result<Self> {
        let mut scratch = Self::of(info.output);
        scratch.resize(info.batch, info)?;
        Ok(scratch)
    }

    fn of(output: Output) -> Self {
        let pictures = match output {
            Output::F32 => Pictures::F32(Vec::new()),
            Output::U8 => Pictures::U8(Vec::new()),
        };
        Self { noise: Vec::new(), index: Vec::new(), pictures }
    }

    /// Makes room for this many pictures.
    fn resize(&mut self, pictures: usize, info: &Info) -> Result<()> {
        let values = pictures * info.values();
        resize(&mut self.noise, values)?;
        resize(&mut self.index, if info.index().is_some() { pictures } else { 0 })?;
        match &mut self.pictures {
            Pictures::F32(pictures) => resize(pictures, values),
            Pictures::U8(pictures) => resize(pictures, values),
        }
    }

    /// Makes the next pass's noise of the pictures so far. A file of several passes gives f32, which its contract checks.
    pub fn refine(&mut self, seed: u64, pass: usize, first: usize, sigma: f64, values: usize, count: usize) {
        let Pictures::F32(pictures) = &self.pictures else { return };
        let inputs = self.noise.chunks_exact_mut(values).zip(pictures.chunks_exact(values));
        for (i, (input, picture)) in inputs.take(count).enumerate() {
            refine(seed, pass, (first + i) as u64, picture, sigma, input);
        }
    }
}

impl Scratch {
    /// Runs an engine on the noise and the index.
    pub fn run(&mut self, engine: &dyn Engine, info: &Info) -> Result<(), String> {
        let Scratch { noise, index, pictures } = self;
        let shape = [noise.len() / info.values(), info.channels, info.height, info.width];
        let rows = [index.len()];
        let feeds = [
            Feed { name: "noise", shape: &shape, values: Values::F32(noise) },
            Feed { name: info.index().unwrap_or_default(), shape: &rows, values: Values::I64(index) },
        ];
        engine.run(if info.index().is_some() { &feeds } else { &feeds[..1] }, &mut [pictures.out()])
    }

    /// Takes away what an engine has written, so that one which writes nothing is found out.
    pub fn clear_pictures(&mut self) {
        match &mut self.pictures {
            Pictures::F32(pictures) => pictures.fill(f32::NAN),
            Pictures::U8(pictures) => pictures.fill(0),
        }
    }

    /// The pictures in `[-1, 1]`, in the order of the graph's output.
    pub fn values(&self) -> Vec<f64> {
        match &self.pictures {
            Pictures::F32(pictures) => pictures.iter().map(|x| f64::from(*x)).collect(),
            Pictures::U8(pictures) => pictures.iter().map(|x| f64::from(*x) / 127.5 - 1.0).collect(),
        }
    }
}

impl Pictures {
    fn out(&mut self) -> Out<'_> {
        match self {
            Self::F32(pictures) => Out::F32(pictures),
            Self::U8(pictures) => Out::U8(pictures),
        }
    }

    fn leading(&self, values: usize) -> Raw<'_> {
        match self {
            Self::F32(pictures) => Raw::F32(&pictures[..values]),
            Self::U8(pictures) => Raw::U8(&pictures[..values]),
        }
    }
}

fn first_not_finite(pictures: Raw<'_>, values: usize) -> Option<usize> {
    let Raw::F32(pictures) = pictures else { return None };
    pictures.chunks_exact(values).position(|picture| !picture.iter().all(|x| x.is_finite()))
}
