//! Any file of `dmd export` by the names of its inputs: what a generator is made of where it is not one file, a text
//! encoder, a network that is told text, a decoder.

use std::path::Path;

use crate::contract::Source;
use crate::engine::{self, Engine, Out};
use crate::limits::{MAX_VALUES, zeros};
use crate::{EngineInfo, Error, Feed, ModuleInfo, Options, Result};

/// A loaded file, run on the processor.
///
/// ```no_run
/// use dmd_runtime::{Feed, Given, Module, Options, Values};
///
/// let decoder = Module::load("decoder.onnx", Options::default())?;
/// let latents = vec![0.0; 4 * 64 * 64];
/// let feed = Feed { name: "latents", shape: &[1, 4, 64, 64], values: Values::F32(&latents) };
/// let [Given::F32(image)] = &decoder.run(&[feed])?[..] else { panic!("one output") };
/// assert_eq!(image.len(), 3 * 512 * 512);
/// # Ok::<(), dmd_runtime::Error>(())
/// ```
pub struct Module {
    info: ModuleInfo,
    engine_info: EngineInfo,
    engine: Box<dyn Engine>,
}

/// The values of an output, of the shape that [`ModuleInfo::outputs`] says, in C order.
#[derive(Clone, Debug, PartialEq)]
pub enum Given {
    /// Single precision.
    F32(Vec<f32>),
    /// Bytes.
    U8(Vec<u8>),
}

impl Module {
    /// Opens a file. Accelerators are for generators ([`Generator`](crate::Generator)), which are proven by the pictures
    /// that they make.
    pub fn load(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        let source = Source::File(path.as_ref());
        let info = ModuleInfo::of(source)?;
        let (engine, engine_info) = engine::cpu(source, &info, &options)?;
        Ok(Self { info, engine_info, engine })
    }

    /// What the file says of itself.
    pub fn info(&self) -> &ModuleInfo {
        &self.info
    }

    /// What runs it.
    pub fn engine(&self) -> &EngineInfo {
        &self.engine_info
    }

    /// Runs it once on a feed for each of its inputs, in any order, and gives its outputs in the file's order. All feeds
    /// have the file's number of samples, or where that is free any one number.
    pub fn run(&self, feeds: &[Feed<'_>]) -> Result<Vec<Given>> {
        let samples = feeds.first().and_then(|feed| feed.shape.first().copied()).unwrap_or(0);
        let refuse = |reason: String| Err(Error::Feed { reason });
        for port in &self.info.inputs {
            let expected: Vec<usize> = port.shape.iter().map(|n| n.unwrap_or(samples)).collect();
            let Some(feed) = feeds.iter().find(|feed| feed.name == port.name) else {
                return refuse(format!("nothing is given for {:?}, {} {expected:?}", port.name, port.kind));
            };
            let (n, kind) = feed.values.len_and_kind();
            if feed.shape != expected || kind != port.kind || n != expected.iter().product::<usize>() {
                return refuse(format!(
                    "{:?} is given {n} values of {kind} in shape {:?}, expected {} {expected:?}",
                    port.name, feed.shape, port.kind
                ));
            }
        }
        if feeds.len() != self.info.inputs.len() || samples == 0 {
            let names: Vec<&str> = self.info.inputs.iter().map(|port| port.name.as_str()).collect();
            return refuse(format!("{} feeds of {samples} samples are given for {names:?}", feeds.len()));
        }
        let mut given = Vec::with_capacity(self.info.outputs.len());
        for port in &self.info.outputs {
            let n = port.shape.iter().try_fold(1usize, |n, side| n.checked_mul(side.unwrap_or(samples)));
            let n = n.filter(|n| *n <= MAX_VALUES).ok_or_else(|| Error::TooLarge {
                pictures: samples,
                values: port.shape.iter().map(|side| side.unwrap_or(1)).product(),
                limit: MAX_VALUES,
            })?;
            given.push(if port.kind == "u8" { Given::U8(zeros(n)?) } else { Given::F32(zeros(n)?) });
        }
        let mut outs: Vec<Out<'_>> = given
            .iter_mut()
            .map(|given| match given {
                Given::F32(values) => Out::F32(values),
                Given::U8(values) => Out::U8(values),
            })
            .collect();
        let run = self.engine.run(feeds, &mut outs);
        drop(outs);
        run.map_err(|reason| Error::Run { engine: self.engine_info.kind, reason })?;
        Ok(given)
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module").field("info", &self.info).field("engine", &self.engine_info).finish_non_exhaustive()
    }
}
