//! What is asked of a generator: which pictures, and a hand on them while they are made.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// Which pictures to make.
///
/// ```
/// use dmd_runtime::Request;
///
/// let one = Request { seed: 7, labels: vec!["star".into()], ..Request::default() };
/// let several = Request { labels: vec![0.into(), "star".into()], batch: 2, ..Request::default() };
/// # assert_eq!((one.batch, several.labels.len()), (1, 2));
/// ```
#[derive(Clone, Debug)]
pub struct Request {
    /// Picture `i` depends on the seed, on `i` and on its label, not on the batch it is made in.
    pub seed: u64,
    /// One class for all pictures, or one for each. Empty: a generator with classes cycles through them.
    pub labels: Vec<Label>,
    /// The number of pictures, which may differ from the file's own batch.
    pub batch: usize,
    /// Hears how far the pictures are, and can call them off.
    pub watch: Option<Watch>,
}

impl Default for Request {
    /// One picture of seed 0.
    fn default() -> Self {
        Self { seed: 0, labels: Vec::new(), batch: 1, watch: None }
    }
}

/// A class of a generator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Label {
    /// By its number, from 0.
    Index(usize),
    /// By its name, or by its number in digits: see [`Info::class`](crate::Info::class).
    Name(String),
}

impl From<usize> for Label {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

impl From<&str> for Label {
    fn from(name: &str) -> Self {
        Self::Name(name.into())
    }
}

/// A hand on a request, shared with other threads by a clone.
///
/// ```no_run
/// use dmd_runtime::{Error, Generator, Options, Request, Watch};
///
/// let generator = Generator::load("emoji-32.onnx", Options::default())?;
/// let watch = Watch::on_progress(|progress| println!("{} of {}", progress.done, progress.total));
/// let button = watch.clone();
/// std::thread::spawn(move || button.cancel());
/// let request = Request { batch: 1000, watch: Some(watch), ..Request::default() };
/// match generator.generate(&request) {
///     Err(Error::Cancelled) => println!("no pictures"),
///     images => println!("{}", images?.len()),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Watch(Arc<Watched>);

#[derive(Default)]
struct Watched {
    cancelled: AtomicBool,
    on_progress: Option<Box<dyn Fn(Progress) + Send + Sync>>,
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Passes that are done, of all pictures together.
    pub done: usize,
    /// Passes that there will be.
    pub total: usize,
}

impl Watch {
    /// One that can cancel.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that calls back, too: at the beginning and after each pass of each chunk, on the thread that makes the pictures.
    pub fn on_progress(call: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self(Arc::new(Watched { cancelled: AtomicBool::new(false), on_progress: Some(Box::new(call)) }))
    }

    /// Calls the pictures off: the request ends with [`Error::Cancelled`], after the pass that is under way, whose result is
    /// dropped. No accelerator stops within a pass. A request that is begun later with this watch ends at once.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether somebody called the pictures off.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn report(&self, progress: Progress) -> Result<()> {
        if let Some(call) = &self.0.on_progress {
            call(progress);
        }
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("is_cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}
