//! `dmd bench run`: latency, load time and memory of an exported file, on each accelerator and number of threads. Where there
//! are several, each has a process of its own: it loads its own library, and holds nothing of the others'.

use super::{check_free, engine_options, exported_file, make_parent, without_effect};
use crate::aside::write_aside;
use crate::cli::{BenchRunArgs, Engine, WrongUsage};
use crate::eval::percentile;
use crate::output::{result, say};
use crate::picture::save;
use crate::plot::spread;
use crate::{device, limits, memory};
use anyhow::{Context, Result, bail, ensure};
use dmd_runtime::{Accelerator, Generator, Options, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Calls before the clock starts, beside the first.
const WARM_UP: usize = 4;

/// What is timed: an accelerator as it was asked for, and a number of threads.
struct Case<'a> {
    words: Option<&'a str>,
    accelerator: Option<Accelerator>,
    threads: Option<usize>,
}

/// A case and what came of it.
#[derive(Serialize, Deserialize)]
struct Row {
    asked: Option<String>,
    threads: Option<usize>,
    /// What ran it.
    engine: String,
    /// Why the accelerator did not, and then nothing was timed.
    passed_over: Option<String>,
    #[serde(flatten)]
    figures: Option<Figures>,
}

#[derive(Serialize, Deserialize)]
struct Figures {
    /// From a path to a generator; with an accelerator, its proof and the processor's load in it.
    load_ms: f64,
    first_ms: f64,
    min_ms: f64,
    median_ms: f64,
    p90_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    /// The median of the bare engine's calls.
    engine_ms: f64,
    /// What loading and running added, library and all: memory of the process's own, and of mapped files.
    anonymous_bytes: Option<u64>,
    mapped_bytes: Option<u64>,
    peak_memory_bytes: Option<u64>,
    times_ms: Vec<f64>,
}

/// Times a file and prints a table.
pub fn run(args: &BenchRunArgs, threads: Option<usize>) -> Result<Value> {
    limits::count("--runs", args.runs as u64, limits::RUNS)?;
    exported_file(&args.onnx)?;
    without_effect("--threads", threads.is_some() && !args.thread_counts.is_empty(), "--thread-counts says how many")?;
    without_effect("--low-memory", args.low_memory && args.engine == Engine::Tract, "tract has no such choice")?;
    without_effect("--force", args.force && args.plot.is_none(), "without --plot nothing is written")?;
    if let Some(plot) = &args.plot {
        let known = ["png", "svg"].map(OsStr::new).contains(&plot.extension().unwrap_or_default());
        ensure!(known, WrongUsage(format!("--plot {}: expected a name that ends with .png or .svg", plot.display())));
        check_free(plot, args.force)?;
    }
    let cases = cases(args, threads)?;
    let batch = dmd_runtime::Info::read(&args.onnx)?.batch;
    result(&format!("{}: {batch} at a time, {} calls; times in ms, memory in MiB", args.onnx.display(), args.runs))?;
    let columns = ["load", "first", "min", "median", "p90", "p99", "engine", "own", "mapped"];
    result(&line("", "threads", &columns.map(String::from)))?;
    let mut rows = Vec::new();
    for case in &cases {
        let row = if cases.len() == 1 { timed(args, case)? } else { apart(args, case)? };
        result(&row.told())?;
        rows.push(row);
    }
    if let Some(plot) = &args.plot {
        draw(plot, &rows)?;
    }
    Ok(json!({ "file": args.onnx, "batch": batch, "runs": args.runs, "low_memory": args.low_memory, "rows": rows }))
}

/// Every accelerator with every number of threads.
fn cases(args: &BenchRunArgs, threads: Option<usize>) -> Result<Vec<Case<'_>>> {
    let counts = args.thread_counts.iter().map(|n| device::threads(*n)).collect::<Result<Vec<_>>>()?;
    let counts = if counts.is_empty() { vec![threads] } else { counts.into_iter().map(Some).collect() };
    let mut cases = Vec::new();
    let words = args.accelerator.iter().map(|words| Some(words.as_str()));
    for words in words.chain(args.accelerator.is_empty().then_some(None)) {
        let accelerator = words.map(|words| words.parse::<Accelerator>()).transpose();
        let accelerator = accelerator.map_err(|error| WrongUsage(format!("--accelerator: {error}")))?;
        cases.extend(counts.iter().map(|threads| Case { words, accelerator: accelerator.clone(), threads: *threads }));
    }
    Ok(cases)
}

/// The same command for one case alone.
fn apart(args: &BenchRunArgs, case: &Case<'_>) -> Result<Row> {
    let engine = match args.engine {
        Engine::Auto => "auto",
        Engine::Onnxruntime => "onnxruntime",
        Engine::Tract => "tract",
    };
    let mut command = Command::new(std::env::current_exe().context("where this program lies is not known")?);
    command.args(["bench", "run", "--json", "--quiet", "--engine", engine, "--runs", &args.runs.to_string()]);
    command.args(case.words.iter().flat_map(|words| ["--accelerator", words]));
    command.args(case.threads.iter().flat_map(|n| ["--threads".to_owned(), n.to_string()]));
    command.args(args.low_memory.then_some("--low-memory")).arg("--").arg(&args.onnx);
    let output = command.stdin(Stdio::null()).output().context("a process for one case cannot be started")?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {}: {}", case.name(), output.status, stderr.trim());
    // Plug-ins print, too.
    #[derive(Deserialize)]
    struct Printed {
        rows: [Row; 1],
    }
    let object = stdout.find("{\"").map_or("", |at| &stdout[at..]);
    let mut objects = serde_json::Deserializer::from_str(object).into_iter::<Printed>();
    match objects.next() {
        Some(Ok(Printed { rows: [row] })) => Ok(row),
        other => bail!("{}: printed {stdout:?}, which has no row ({:?})", case.name(), other.map(|o| o.err())),
    }
}

fn timed(args: &BenchRunArgs, case: &Case<'_>) -> Result<Row> {
    let before = memory::resident_bytes();
    let options = Options {
        accelerators: case.accelerator.iter().cloned().collect(),
        low_memory: args.low_memory,
        ..engine_options(args.engine, case.threads)
    };
    let since = |started: Instant| started.elapsed().as_secs_f64() * 1e3;
    let started = Instant::now();
    let generator = Generator::load(&args.onnx, options)?;
    let load_ms = since(started);
    let engine = format!("{} {}", generator.engine().kind, generator.engine().version);
    let placement = generator.placement();
    let asked = case.accelerator.as_ref().map(Accelerator::to_string);
    let row = |passed_over, figures| Row { asked, threads: case.threads, engine, passed_over, figures };
    if let Some(passed) = placement.passed_over.first() {
        return Ok(row(Some(format!("{}: {}", passed.step, passed.reason)), None));
    }
    let request = Request { batch: generator.info().batch, ..Request::default() };
    let generate = || -> Result<f64> {
        let started = Instant::now();
        generator.generate(&request)?;
        Ok(since(started))
    };
    let first_ms = generate()?;
    (0..WARM_UP).try_for_each(|_| generate().map(drop))?;
    let (mut times_ms, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        times_ms.push(generate()?);
        let started = Instant::now();
        generator.warm_up()?;
        bare.push(since(started));
    }
    let added = |i: usize| Some(memory::resident_bytes()?[i].saturating_sub(before?[i]));
    let mut sorted = times_ms.clone();
    let [min_ms, median_ms, p90_ms, p99_ms, max_ms] = [0.0, 0.5, 0.9, 0.99, 1.0].map(|at| percentile(&mut sorted, at));
    let figures = Figures {
        load_ms,
        first_ms,
        min_ms,
        median_ms,
        p90_ms,
        p99_ms,
        max_ms,
        engine_ms: percentile(&mut bare, 0.5),
        anonymous_bytes: added(0),
        mapped_bytes: added(1),
        peak_memory_bytes: memory::peak_bytes(&candle_core::Device::Cpu),
        times_ms,
    };
    Ok(row(None, Some(figures)))
}

impl Case<'_> {
    fn name(&self) -> String {
        self.accelerator.as_ref().map_or("the processor".into(), Accelerator::to_string)
    }
}

impl Row {
    /// What ran it, for people.
    fn name(&self) -> String {
        self.asked.as_ref().map_or(self.engine.clone(), |asked| format!("{asked}, {}", self.engine))
    }

    /// A line of the table.
    fn told(&self) -> String {
        let threads = self.threads.map_or("all".into(), |n| n.to_string());
        match (&self.figures, &self.passed_over) {
            (Some(f), _) => {
                let times = [f.load_ms, f.first_ms, f.min_ms, f.median_ms, f.p90_ms, f.p99_ms, f.engine_ms];
                let mib = |bytes: Option<u64>| {
                    bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 / f64::from(1 << 20)))
                };
                let memory = [mib(f.anonymous_bytes), mib(f.mapped_bytes)];
                let cells: Vec<String> = times.map(|ms| format!("{ms:.3}")).into_iter().chain(memory).collect();
                line(&self.name(), &threads, &cells)
            }
            (None, why) => format!("{:<36} not taken: {}", self.name(), why.as_deref().unwrap_or_default()),
        }
    }
}

fn line(name: &str, threads: &str, cells: &[String]) -> String {
    let cells: String = cells.iter().map(|cell| format!(" {cell:>9}")).collect();
    format!("{name:<36} {threads:>7}{cells}")
}

fn draw(path: &Path, rows: &[Row]) -> Result<()> {
    let curve = |row: &Row| {
        let threads = row.threads.map_or(String::new(), |n| format!(", {n} thread{}", if n == 1 { "" } else { "s" }));
        row.figures.as_ref().map(|figures| (row.name() + &threads, figures.times_ms.clone()))
    };
    let curves: Vec<_> = rows.iter().filter_map(curve).collect();
    let chart = spread(&curves).context("--plot: nothing was timed")?;
    make_parent(path)?;
    match path.extension().is_some_and(|ending| ending == "svg") {
        true => write_aside(path, |file| Ok(file.write_all(chart.svg().as_bytes())?))?,
        false => save(path, &chart.painted()?)?,
    }
    say(&format!("the plot: {}", path.display()));
    Ok(())
}
