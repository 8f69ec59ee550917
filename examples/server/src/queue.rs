//! Requests in a row of bounded length, and the one thread that makes their pictures: those of all who wait, up to a call's
//! limit, by one call. Nobody is made to wait for others to come.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmd_runtime::{Generator, Image, Images, Request, Watch, picture_noise};
use ndarray::{Axis, concatenate};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::oneshot;

use crate::Metrics;

/// How much is taken on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests that may wait.
    pub waiting: usize,
    /// Pictures of one call, for a file with a free batch; other files have their own.
    pub batch: usize,
    /// How long a request may take.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { waiting: 256, batch: 16, patience: Duration::from_secs(10) }
    }
}

/// One picture, for somebody who waits for its PNG.
pub struct Job {
    pub seed: u64,
    pub label: usize,
    /// Cancelled when nobody waits any more.
    pub watch: Watch,
    pub reply: oneshot::Sender<Result<Vec<u8>, String>>,
}

pub struct Queue(Sender<Job>);

impl Queue {
    pub fn start(generator: Arc<Generator>, metrics: Arc<Metrics>, limits: Limits) -> Result<Self> {
        ensure!(limits.waiting > 0 && limits.batch > 0, "{limits:?}: waiting and batch are 1 at least");
        let (sender, receiver) = mpsc::channel(limits.waiting);
        let info = generator.info();
        // The noise between the passes is of one seed for a call.
        let batch = match (info.passes(), info.dynamic_batch) {
            (1, true) => limits.batch,
            (1, false) => info.batch,
            _ => 1,
        };
        let work = move || work(&generator, receiver, batch, &metrics);
        thread::Builder::new().name("pictures".into()).spawn(work).context("a thread cannot be started")?;
        Ok(Self(sender))
    }

    /// Puts a request at the end of the row; false where that is full.
    pub fn take(&self, job: Job) -> bool {
        self.0.try_send(job).is_ok()
    }
}

fn work(generator: &Generator, mut jobs: Receiver<Job>, batch: usize, metrics: &Metrics) {
    while let Some(first) = jobs.blocking_recv() {
        let mut call = vec![first];
        while call.len() < batch
            && let Ok(job) = jobs.try_recv()
        {
            call.push(job);
        }
        let waiting = jobs.len();
        let before = call.len();
        call.retain(|job| !job.watch.is_cancelled());
        metrics.called(call.len(), before - call.len(), waiting);
        if call.is_empty() {
            continue;
        }
        match pictures(generator, &call) {
            // Whoever went away meanwhile takes no answer.
            Ok(images) => call.into_iter().zip(images.iter()).for_each(|(job, image)| _ = job.reply.send(png(image))),
            Err(reason) => call.into_iter().for_each(|job| _ = job.reply.send(Err(reason.clone()))),
        }
    }
}

fn png(image: Image<'_>) -> Result<Vec<u8>, String> {
    image.to_png().map_err(|error| error.to_string())
}

/// The pictures that each request would get alone: number 0 of its seed.
fn pictures(generator: &Generator, call: &[Job]) -> Result<Images, String> {
    let info = generator.info();
    let labelled = info.labelled();
    if let [job] = call {
        let labels = if labelled { vec![job.label.into()] } else { Vec::new() };
        let request = Request { seed: job.seed, labels, watch: Some(job.watch.clone()), ..Request::default() };
        return generator.generate(&request).map_err(|error| error.to_string());
    }
    let noise: Vec<_> = call.iter().map(|job| picture_noise(job.seed, 0, 1, info.shape())).collect();
    let views: Vec<_> = noise.iter().map(|noise| noise.view()).collect();
    let noise = concatenate(Axis(0), &views).map_err(|error| error.to_string())?;
    let labels: Vec<i64> = if labelled { call.iter().map(|job| job.label as i64).collect() } else { Vec::new() };
    generator.run(noise.view(), &labels).map_err(|error| error.to_string())
}
