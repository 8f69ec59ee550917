//! Goes along the app's list of accelerators until one is proven, and on from there when that one fails later.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::probe::{self, Reference};
use super::{Engine, EngineInfo, accelerated, cpu};
use crate::contract::{Kept, Source};
use crate::placement::{PassedOver, Placement, Step};
use crate::{Accelerator, EngineKind, Error, Info, Options, Result};

/// What runs a file for now.
pub(crate) struct Running {
    pub engine: Box<dyn Engine>,
    pub engine_info: EngineInfo,
    pub placement: Placement,
    /// Where in the list to go on when it fails; `None` for what stands behind the list.
    next: Option<usize>,
    /// Whether it failed, for the many that ask, and how.
    failed: AtomicBool,
    failure: Mutex<Option<String>>,
}

/// An engine that ONNX Runtime made for an accelerator, and what it says that it runs where.
pub(crate) struct Candidate {
    pub engine: Box<dyn Engine>,
    pub provider: String,
    /// Which nodes run where, to be asked after a first run.
    pub nodes: Box<dyn FnOnce() -> Result<Vec<crate::PlacedNode>, String>>,
}

/// Why an accelerator is not taken.
pub(crate) type Refusal = (Step, String);

/// What [`Placing`] asks for engines; tests have another one.
pub(crate) trait Openers: Send + Sync {
    fn cpu(&self) -> Result<(Box<dyn Engine>, EngineInfo)>;
    fn accelerated(&self, accelerator: &Accelerator) -> Result<Candidate, Refusal>;
}

/// A list of accelerators, and the file that they may run.
pub(crate) struct Placing {
    info: Info,
    accelerators: Vec<Accelerator>,
    require: bool,
    /// Where something stands behind what runs the file now.
    openers: Option<Box<dyn Openers>>,
}

/// The engines of this build.
struct Built<'a> {
    source: Source<'a>,
    info: &'a Info,
    options: &'a Options,
}

/// The same, of a file that is kept.
struct Lasting {
    kept: Kept,
    info: Info,
    options: Options,
}

impl Openers for Built<'_> {
    fn cpu(&self) -> Result<(Box<dyn Engine>, EngineInfo)> {
        cpu(self.source, &self.info.module(), self.options)
    }

    fn accelerated(&self, accelerator: &Accelerator) -> Result<Candidate, Refusal> {
        accelerated(self.source, &self.info.module(), self.options, accelerator)
    }
}

impl Lasting {
    fn built(&self) -> Built<'_> {
        Built { source: self.kept.source(), info: &self.info, options: &self.options }
    }
}

impl Openers for Lasting {
    fn cpu(&self) -> Result<(Box<dyn Engine>, EngineInfo)> {
        let found = Info::of(self.kept.source())?;
        if found != self.info {
            let reason = "is another file than the one that was loaded first".into();
            return Err(Error::Inconsistent { path: self.kept.source().path().into(), reason });
        }
        self.built().cpu()
    }

    fn accelerated(&self, accelerator: &Accelerator) -> Result<Candidate, Refusal> {
        self.built().accelerated(accelerator)
    }
}

impl Placing {
    fn new(info: Info, options: &Options) -> Self {
        let accelerators = options.accelerators.clone();
        Self { info, accelerators, require: options.require_accelerator, openers: None }
    }

    /// Opens a file; keeps it only where an accelerator runs it, which may fail.
    pub fn open(source: Source<'_>, info: &Info, options: Options) -> Result<(Self, Arc<Running>)> {
        let mut placing = Self::new(info.clone(), &options);
        let running = placing.from(&Built { source, info, options: &options }, 0, Vec::new())?;
        if running.next.is_some() {
            let kept = Kept::of(source);
            placing.openers = Some(Box::new(Lasting { kept, info: info.clone(), options }));
        }
        Ok((placing, running))
    }

    /// What runs it after that one has failed.
    pub fn after(&self, failed: &Running) -> Result<Arc<Running>> {
        let mut passed_over = failed.placement.passed_over.clone();
        let reason = failed.failure().clone().unwrap_or_default();
        passed_over.push(PassedOver { accelerator: failed.placement.accelerator.clone(), step: Step::Run, reason });
        let openers = self.openers.as_deref().expect("what can fail keeps its file");
        self.from(openers, failed.next.unwrap_or(self.accelerators.len()), passed_over)
    }

    fn from(&self, openers: &dyn Openers, first: usize, mut passed_over: Vec<PassedOver>) -> Result<Arc<Running>> {
        let asked = self.accelerators.iter().enumerate().skip(first);
        let asked: Vec<_> = asked.take_while(|(_, accelerator)| **accelerator != Accelerator::Cpu).collect();
        let (engine, engine_info) = openers.cpu()?;
        if !asked.is_empty() {
            let mut reference = Reference::of(&*engine, &self.info);
            for (at, accelerator) in asked {
                match self.proven(openers, accelerator, &mut reference) {
                    Ok((engine, mut placement)) => {
                        placement.passed_over = passed_over;
                        return Ok(Running::new(engine, engine_info, placement, Some(at + 1)));
                    }
                    Err((step, reason)) => {
                        log::warn!("{accelerator}: {step}: {reason}");
                        passed_over.push(PassedOver { accelerator: accelerator.to_string(), step, reason });
                    }
                }
            }
        }
        if self.require {
            return Err(Error::NoAccelerator { passed_over });
        }
        let accelerator = if engine_info.kind == EngineKind::Tract { "tract" } else { "CPU" };
        let provider = if engine_info.kind == EngineKind::Tract { "tract" } else { "CPUExecutionProvider" };
        let placement = Placement {
            accelerator: accelerator.into(),
            provider: provider.into(),
            passed_over,
            ..Placement::default()
        };
        Ok(Running::new(engine, engine_info, placement, None))
    }

    /// An accelerator that takes nodes of the graph and makes the processor's picture.
    fn proven(
        &self,
        openers: &dyn Openers,
        accelerator: &Accelerator,
        reference: &mut Result<Reference, String>,
    ) -> Result<(Box<dyn Engine>, Placement), Refusal> {
        let Candidate { engine, provider, nodes } = openers.accelerated(accelerator)?;
        let reference = reference.as_mut().map_err(|reason| (Step::Probe, format!("the processor fails: {reason}")))?;
        // The run comes first: older libraries tell only in its profile what ran where.
        let compared = reference.compare(&*engine, &self.info);
        let nodes = nodes().map_err(|reason| (Step::Assignment, reason));
        let placement = |nodes, probe| Placement {
            accelerator: accelerator.to_string(),
            provider: provider.clone(),
            nodes,
            probe,
            passed_over: Vec::new(),
        };
        if compared.is_ok() || nodes.is_ok() {
            let placement = placement(nodes.clone()?, None);
            check_assignment(&placement, self.require)?;
        }
        let probe = compared.map_err(|reason| (Step::Probe, format!("fails when it runs: {reason}")))?;
        match probe::refusal(&probe, &self.info, accelerator.computes_half()) {
            Some(reason) => Err((Step::Probe, reason)),
            None => Ok((engine, placement(nodes?, Some(probe)))),
        }
    }
}

impl Running {
    fn new(engine: Box<dyn Engine>, engine_info: EngineInfo, placement: Placement, next: Option<usize>) -> Arc<Self> {
        log::info!("{placement}");
        let (failed, failure) = (AtomicBool::new(false), Mutex::new(None));
        Arc::new(Self { engine, engine_info, placement, next, failed, failure })
    }

    /// Notes that an accelerator failed, so that the next call takes the next one, and says what failed. Nothing stands
    /// behind the processor, which is asked again.
    pub fn fail(&self, reason: String) -> String {
        if self.next.is_none() {
            return reason;
        }
        *self.failure() = Some(reason.clone());
        self.failed.store(true, Ordering::Release);
        format!("{}: {reason}", self.placement.accelerator)
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn failure(&self) -> MutexGuard<'_, Option<String>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// At least one node, and where an accelerator is required, all.
fn check_assignment(placement: &Placement, require: bool) -> Result<(), Refusal> {
    let (taken, all) = placement.taken();
    if taken == 0 {
        return Err((Step::Assignment, format!("it takes none of the {all} nodes: the processor would run them all")));
    }
    let others = placement.nodes.iter().filter(|node| node.provider != placement.provider);
    let mut operators: Vec<&str> = others.map(|node| node.operator.as_str()).collect();
    operators.sort_unstable();
    operators.dedup();
    match operators.is_empty() || !require {
        true => Ok(()),
        false => Err((
            Step::Assignment,
            format!("it leaves {} of {all} nodes to the processor: {}", all - taken, operators.join(", ")),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::engine::{Feed, Out, Values};
    use crate::{Generator, PlacedNode, PlugIn, Request};

    /// Gives its noise back, off by `error`; fails from call number `fails_at` on.
    struct Echo {
        error: f32,
        calls: AtomicUsize,
        fails_at: usize,
    }

    impl Engine for Echo {
        fn run(&self, feeds: &[Feed<'_>], outs: &mut [Out<'_>]) -> Result<(), String> {
            let (Values::F32(noise), [Out::F32(out)]) = (feeds[0].values, outs) else { return Err("no floats".into()) };
            if self.calls.fetch_add(1, Ordering::Relaxed) >= self.fails_at {
                return Err("device lost".into());
            }
            out.iter_mut().zip(noise).for_each(|(out, x)| *out = x + self.error);
            Ok(())
        }
    }

    /// What each accelerator of these names does: its error, the calls that it stands, the nodes of three that it takes.
    struct Mock {
        accelerators: Vec<(&'static str, f32, usize, usize)>,
    }

    impl Openers for Mock {
        fn cpu(&self) -> Result<(Box<dyn Engine>, EngineInfo)> {
            let info = EngineInfo { kind: EngineKind::OnnxRuntime, version: "1".into(), library: None, warning: None };
            Ok((Box::new(Echo { error: 0.0, calls: 0.into(), fails_at: usize::MAX }), info))
        }

        fn accelerated(&self, accelerator: &Accelerator) -> Result<Candidate, Refusal> {
            let found = self.accelerators.iter().find(|(name, ..)| *name == accelerator.to_string());
            let (_, error, fails_at, taken) = *found.ok_or((Step::Device, "there is none".into()))?;
            let node = move |i: usize| PlacedNode {
                name: format!("n{i}"),
                operator: ["Conv", "Gather", "Add"][i].into(),
                provider: if i < taken { "P".into() } else { "CPUExecutionProvider".into() },
            };
            Ok(Candidate {
                engine: Box::new(Echo { error, calls: 0.into(), fails_at }),
                provider: "P".into(),
                nodes: Box::new(move || Ok((0..3).map(node).collect())),
            })
        }
    }

    fn placing(names: &[&str], require: bool) -> Placing {
        let info = Info { channels: 1, height: 2, width: 2, ..Info::default() };
        let named = |name: &&str| match *name {
            "CPU" => Accelerator::Cpu,
            name => Accelerator::Custom { name: name.into(), plug_in: PlugIn::new("/none"), fp16: false },
        };
        let accelerators = vec![
            ("good", 0.0, usize::MAX, 3),
            ("partial", 1e-4, usize::MAX, 2),
            ("liar", 500.0, usize::MAX, 3),
            ("empty", 0.0, usize::MAX, 0),
            ("boaster", 0.0, 0, 3),
            ("nan", f32::NAN, usize::MAX, 3),
            ("mortal", 0.0, 2, 3),
        ];
        let openers: Option<Box<dyn Openers>> = Some(Box::new(Mock { accelerators }));
        Placing { openers, info, accelerators: names.iter().map(named).collect(), require }
    }

    fn first(placing: &Placing) -> Result<Arc<Running>> {
        placing.from(placing.openers.as_deref().unwrap(), 0, Vec::new())
    }

    fn generator(placing: Placing) -> Generator {
        let running = first(&placing).unwrap();
        Generator::new(placing.info.clone(), placing, running).unwrap()
    }

    #[test]
    fn an_accelerator_is_taken_after_it_has_proven_itself_and_others_are_told_why_not() {
        let found = first(&placing(&["absent", "empty", "boaster", "liar", "nan", "partial", "good"], false)).unwrap();
        assert_eq!((found.placement.accelerator.as_str(), found.placement.taken()), ("partial", (2, 3)));
        let reasons: Vec<_> =
            found.placement.passed_over.iter().map(|p| (p.accelerator.as_str(), p.step, p.reason.as_str())).collect();
        assert_eq!(
            reasons,
            [
                ("absent", Step::Device, "there is none"),
                ("empty", Step::Assignment, "it takes none of the 3 nodes: the processor would run them all"),
                ("boaster", Step::Probe, "fails when it runs: device lost"),
                ("liar", Step::Probe, "5.0e2 from the processor's, at most 1.0e-3 is allowed"),
                ("nan", Step::Probe, "values that are not finite"),
            ]
        );
        let line = found.placement.to_string();
        assert!(line.starts_with("partial: 2 of 3 nodes, at most 1.0e-4 (86.0 dB) from"), "{line}");
        assert!(!line.contains('\n') && line.contains("; passed over: absent (no device: there is none), empty ("));
    }

    #[test]
    fn what_is_required_takes_every_node() {
        let found = first(&placing(&["partial", "good"], true)).unwrap();
        assert_eq!(found.placement.accelerator, "good");
        assert_eq!(found.placement.passed_over[0].reason, "it leaves 1 of 3 nodes to the processor: Add");
        let error = first(&placing(&["partial", "CPU", "good"], true)).err().unwrap().to_string();
        assert!(
            error.contains("no accelerator of the list was taken") && error.contains("partial: too few"),
            "{error}"
        );
    }

    #[test]
    fn nothing_behind_the_processor_is_asked() {
        let found = first(&placing(&["liar", "CPU", "good"], false)).unwrap();
        assert_eq!((found.placement.accelerator.as_str(), found.placement.passed_over.len()), ("CPU", 1));
        assert_eq!(first(&placing(&[], false)).unwrap().placement.to_string(), "CPU");
    }

    /// "mortal" stands the probe and one call.
    #[test]
    fn an_accelerator_that_vanishes_is_an_error_and_the_next_call_takes_the_next() {
        let mortal = generator(placing(&["mortal", "absent", "good"], false));
        let expected = mortal.generate(&Request::default()).unwrap();
        assert_eq!(mortal.placement().accelerator, "mortal");
        let error = mortal.generate(&Request::default()).unwrap_err().to_string();
        assert!(error.contains("mortal: device lost"), "{error}");
        assert_eq!(mortal.generate(&Request::default()).unwrap(), expected);
        let placement = mortal.placement();
        assert_eq!(placement.accelerator, "good");
        let steps: Vec<_> = placement.passed_over.iter().map(|p| (p.accelerator.as_str(), p.step)).collect();
        assert_eq!(steps, [("mortal", Step::Run), ("absent", Step::Device)]);

        // Where an accelerator is required, there is nothing left.
        let alone = generator(placing(&["mortal"], true));
        alone.generate(&Request::default()).unwrap();
        assert!(alone.generate(&Request::default()).is_err());
        let error = alone.generate(&Request::default()).unwrap_err();
        assert!(matches!(error, Error::NoAccelerator { .. }), "{error}");
    }
}
