//! `cargo xtask edge-test`: exported files on accelerators that a machine without any can have: OpenVINO and WebGPU on the
//! processor, and the simulator of Qualcomm's Hexagon, each out of Python's package index, in ONNX Runtimes from the oldest
//! that is promised to the newest. Every run is a process of its own, because a process keeps the library that it loads.
//!
//! What is proven is the runtime's own judgement, which the example `placement` prints: what must be taken is taken, and what
//! is known to lie is passed over. docs/edge.md is written of it.

use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::setup::{self, Environment};
use crate::venv::{self, succeed};
use crate::{chores, onnxruntime};

const DIALECTS: [&str; 3] = ["portable", "nnapi", "native"];
const PRECISIONS: [&str; 4] = ["fp32", "fp16", "w8", "w8a8"];

/// ONNX Runtimes of their own, from the oldest that is promised to the newest that was tried.
const VERSIONS: [&str; 3] = ["1.24.4", "1.31.1", "1.32.0"];

/// Packages with accelerators, and what is fetched of each.
const OPENVINO: (&str, &str) = ("onnxruntime-openvino==1.24.1", "84 MB");
const QNN: (&str, &str) = ("onnxruntime-qnn==2.7.0", "99 MB");
const WEBGPU: (&str, &str) = ("onnxruntime-ep-webgpu==0.4.0", "7 MB");
const GGML: (&str, &str) = ("onnxruntime-ggml==0.2.0", "23 MB");

/// ncnn and what converts ONNX for it: a program in a package that asks for PyTorch, which it does not need.
const NCNN: [&str; 2] = ["numpy>=2", "ncnn==1.0.20261020"];
const PNNX: (&str, &str) = ("pnnx==20261020", "85 MB");

/// A row of the table: an accelerator in one ONNX Runtime.
struct Row {
    name: String,
    library: PathBuf,
    /// As the example takes it; none for the processor.
    accelerator: Option<String>,
    variables: Vec<(&'static str, String)>,
    /// Dialects that are tried: a simulator takes seconds for a picture.
    dialects: &'static [&'static str],
}

/// What must not be taken, where it is, and at which step it is found out.
struct Liar {
    what: &'static str,
    row: Row,
    file: &'static str,
    step: &'static str,
}

/// What became of one file.
enum Cell {
    Taken { taken: String, all: String, difference: String, psnr_db: String, median_ms: String },
    PassedOver { step: String, reason: String },
}

pub fn fetch() -> Result<ExitCode> {
    let ((rows, no_rows), (_, no_liars)) = (rows(), liars());
    no_rows.iter().chain(&no_liars).for_each(|reason| eprintln!("edge-test: to be SKIPPED, {reason}"));
    ensure!(!rows.is_empty(), "nothing of it can be fetched here");
    Ok(ExitCode::SUCCESS)
}

/// Runs everything and writes docs/edge.md; or, where it has to be quick, the plainest file on each accelerator in the
/// newest library that it is here with.
pub fn run(quick: bool) -> Result<ExitCode> {
    let environment = setup::everything()?;
    let (mut rows, mut skipped) = rows();
    let (liars, no_liars) = liars();
    skipped.extend(no_liars);
    let (mut dialects, mut precisions) = (&DIALECTS[..], &PRECISIONS[..]);
    if quick {
        (dialects, precisions) = (&["portable"], &["fp32"]);
        // Of an accelerator in several libraries the last stays.
        let names: Vec<String> = rows.iter().map(|row| row.accelerator.clone().unwrap_or_default()).collect();
        let mut of_row = 0..;
        rows.retain(|_| of_row.next().is_some_and(|i| !names[i + 1..].contains(&names[i])));
    }
    let files =
        dialects.iter().flat_map(|dialect| precisions.iter().map(move |precision| format!("{dialect}-{precision}")));
    let edge = Edge::prepare(environment, files.chain(liars.iter().map(|liar| liar.file.to_string())).collect())?;
    let mut table = String::new();
    let mut failures = Vec::new();
    for row in &rows {
        for dialect in row.dialects.iter().filter(|dialect| dialects.contains(dialect)) {
            let mut line = format!("| {} | {dialect} |", row.name);
            for &precision in precisions {
                let cell = edge.run(row, &format!("{dialect}-{precision}"))?;
                eprintln!("edge-test: {}, {dialect} {precision}: {}", row.name, cell.told());
                // The plainest file is what everybody begins with: every accelerator that is here must take it.
                if let (Cell::PassedOver { step, reason }, "portable", "fp32") = (&cell, *dialect, precision) {
                    failures.push(format!("{} does not take portable fp32: {step}: {reason}", row.name));
                }
                let _ = write!(line, " {} |", cell.short());
            }
            table += &line;
            table.push('\n');
        }
    }
    let mut caught = String::new();
    for Liar { what, row, file, step } in &liars {
        let cell = edge.run(row, file)?;
        eprintln!("edge-test: {what}: {}", cell.told());
        match &cell {
            Cell::PassedOver { step: found, reason } if found == step => {
                let _ = writeln!(caught, "- {what}: {}: {reason}", found.to_lowercase());
            }
            _ => failures.push(format!("{what}: {}, expected to be passed over at {step}", cell.told())),
        }
    }
    if let Some(library) = rows.last().map(|row| &row.library)
        && let Ok(plug_in) = qnn()
        && let Err(error) = edge.compile(library, &plug_in)
    {
        failures.push(format!("QNN does not load what it compiled: {error:#}"));
    }
    if !quick {
        match ncnn() {
            Ok(tools) => edge.run_ncnn(&tools, &mut table, &mut failures)?,
            Err(error) => skipped.push(format!("ncnn: {error:#}")),
        }
    }
    for reason in &skipped {
        eprintln!("edge-test: SKIPPED, {reason}");
    }
    if !quick {
        let page = page(&table, &caught, &skipped)?;
        let path = setup::root().join("docs").join("edge.md");
        fs::write(&path, page).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    eprintln!("edge-test: passed: {} rows, {} that lie were found out", rows.len(), caught.lines().count());
    Ok(ExitCode::SUCCESS)
}

/// The example, and the files that it runs.
struct Edge {
    environment: Environment,
    dmd: PathBuf,
    placement: PathBuf,
    files: PathBuf,
}

impl Edge {
    fn prepare(environment: Environment, names: BTreeSet<String>) -> Result<Self> {
        let dmd = chores::built_dmd(&environment, &[])?;
        let build = ["build", "--release", "--workspace", "--example", "placement"];
        succeed(chores::cargo(&environment).args(build))?;
        let release = dmd.parent().context("dmd lies in no folder")?;
        let placement = release.join("examples").join(format!("placement{}", env::consts::EXE_SUFFIX));
        let files = release.with_file_name("edge-test");
        fs::create_dir_all(&files).with_context(|| format!("{} cannot be made", files.display()))?;
        let edge = Self { environment, dmd, placement, files };
        for name in names {
            let (dialect, precision) = name.split_once('-').context("a file is named by its dialect and precision")?;
            edge.export(dialect, precision, &[], &edge.files.join(format!("{name}.onnx")))?;
        }
        Ok(edge)
    }

    fn export(&self, dialect: &str, precision: &str, more: &[&str], file: &Path) -> Result<()> {
        let teacher = setup::root().join("models").join("pretrained").join("emoji-16");
        let mut export = self.environment.command(&self.dmd);
        export.args(["export", "--as-generator", "--sigma", "2.5", "--force", "--quiet"]).arg(&teacher);
        export.args(["--dialect", dialect, "--precision", precision]).args(more).arg("--onnx").arg(file);
        succeed(&mut export)
    }

    /// Compiles the plainest file for a Snapdragon, and loads it from there in the simulator, in one process.
    fn compile(&self, library: &Path, qnn: &Path) -> Result<()> {
        let mut compile = self.environment.command(&self.dmd);
        compile.arg("compile").arg(self.files.join("portable-fp32.onnx")).arg("--qnn").arg(qnn);
        compile.args(["--qnn-soc", "57", "--out"]).arg(self.files.join("compiled")).env("ORT_DYLIB_PATH", library);
        succeed(&mut compile)
    }

    /// Files of one class, which is what pnnx takes, in ncnn's own runtime. A cell has the greatest difference to the picture
    /// that ONNX Runtime makes of the file, or what ncnn lacks.
    fn run_ncnn(&self, tools: &[PathBuf; 2], table: &mut String, failures: &mut Vec<String>) -> Result<()> {
        let [python, pnnx] = tools;
        let [script, ports] = ["xtask/src/run_ncnn.py", "runtime/noise/ports"].map(|path| setup::root().join(path));
        let expected = self.files.join("ncnn.npy");
        for dialect in DIALECTS {
            let _ = write!(table, "| {}, files of one class | {dialect} |", NCNN[1].replace("==", " "));
            for precision in PRECISIONS {
                let file = self.files.join(format!("ncnn-{dialect}-{precision}.onnx"));
                self.export(dialect, precision, &["--fixed-label", "3"], &file)?;
                let mut sample = self.environment.command(&self.dmd);
                sample.arg("sample").arg(&file).args(["-n", "1", "--seed", "7", "--force", "--quiet", "--npy"]);
                succeed(sample.arg(&expected))?;
                let output = Command::new(python).arg(&script).args([pnnx, &ports, &file, &expected]).output();
                let output = output.with_context(|| format!("{} cannot be started", python.display()))?;
                let (stdout, stderr) =
                    (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                let cell = match stdout.lines().last().and_then(|line| line.split_once('\t')) {
                    Some((layers, difference)) if output.status.success() => format!("{layers} layers, {difference}"),
                    _ => format!("no: {}", stderr.lines().last().unwrap_or("it ends without a word")),
                };
                eprintln!("edge-test: ncnn, {dialect} {precision}: {cell}");
                if let (true, "portable", "fp32") = (cell.starts_with("no"), dialect, precision) {
                    failures.push(format!("ncnn does not take portable fp32: {cell}"));
                }
                let _ = write!(table, " {cell} |");
            }
            table.push('\n');
        }
        Ok(())
    }

    fn run(&self, row: &Row, file: &str) -> Result<Cell> {
        let mut command = self.environment.command(&self.placement);
        command.arg(self.files.join(format!("{file}.onnx"))).args(&row.accelerator).arg("--tabs");
        command.env("ORT_DYLIB_PATH", &row.library).envs(row.variables.iter().map(|(name, value)| (name, value)));
        let output = command.stdin(Stdio::null()).output().context("placement cannot be started")?;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{}, {file}: {}: {stderr}", row.name, output.status);
        // Plug-ins print, too.
        let cells: Option<Vec<&str>> = stdout.lines().rev().find_map(|line| {
            let cells: Vec<&str> = line.split('\t').collect();
            ["taken", "passed over"].contains(&cells[0]).then_some(cells)
        });
        match cells.as_deref() {
            Some(["taken", taken, all, difference, psnr_db, _, median_ms]) => Ok(Cell::Taken {
                taken: (*taken).into(),
                all: (*all).into(),
                difference: (*difference).into(),
                psnr_db: (*psnr_db).into(),
                median_ms: (*median_ms).into(),
            }),
            Some(["passed over", step, reason]) => {
                Ok(Cell::PassedOver { step: (*step).into(), reason: (*reason).into() })
            }
            _ => bail!("{}, {file}: placement printed no line of its own: {stdout}", row.name),
        }
    }
}

impl Cell {
    fn told(&self) -> String {
        match self {
            Cell::Taken { all, median_ms, .. } if all == "0" => format!("runs, {median_ms} ms"),
            Cell::Taken { taken, all, difference, psnr_db, median_ms } => {
                format!("{taken} of {all} nodes, {difference} ({psnr_db} dB), {median_ms} ms")
            }
            Cell::PassedOver { step, reason } => format!("passed over: {step}: {reason}"),
        }
    }

    /// For the table: nodes and difference.
    fn short(&self) -> String {
        match self {
            Cell::Taken { all, .. } if all == "0" => "runs".into(),
            Cell::Taken { taken, all, difference, .. } => format!("{taken}/{all}, {difference}"),
            Cell::PassedOver { step, .. } => format!("no: {}", step.to_lowercase()),
        }
    }
}

/// What can be run here, and why the rest cannot.
fn rows() -> (Vec<Row>, Vec<String>) {
    let mut rows = Vec::new();
    let mut skipped = Vec::new();
    let mut libraries = Vec::new();
    for version in VERSIONS {
        match library(version) {
            Ok(library) => libraries.push((version, library)),
            Err(error) => skipped.push(format!("ONNX Runtime {version}: {error:#}")),
        }
    }
    let row = |name: String, library: &Path, accelerator: Option<String>| Row {
        name,
        library: library.into(),
        accelerator,
        variables: vec![],
        dialects: &DIALECTS,
    };
    for (version, library) in &libraries {
        rows.push(row(format!("ONNX Runtime {version}, CPU"), library, None));
    }
    match openvino() {
        Ok(library) => {
            rows.push(row("OpenVINO (CPU), ONNX Runtime 1.24.1".into(), &library, Some("openvino:CPU".into())))
        }
        Err(error) => skipped.push(format!("OpenVINO: {error:#}")),
    }
    match (webgpu(), software_vulkan()) {
        (Ok(plug_in), Some(driver)) => {
            for (version, library) in &libraries {
                let name = format!("WebGPU 0.4.0 on lavapipe, ONNX Runtime {version}");
                let row = row(name, library, Some(format!("webgpu={}", plug_in.display())));
                let variables =
                    vec![("VK_ICD_FILENAMES", driver.clone()), ("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1".into())];
                rows.push(Row { variables, ..row });
            }
        }
        (Err(error), _) => skipped.push(format!("WebGPU: {error:#}")),
        (_, None) => skipped.push(
            "WebGPU: no software driver of Vulkan here; install Mesa's (mesa-vulkan-drivers, 23 or newer), or name its \
             lvp_icd.json in VK_ICD_FILENAMES"
                .into(),
        ),
    }
    match qnn() {
        Ok(plug_in) => {
            for (version, library) in &libraries {
                let accelerator = format!("qnn={},soc_model=57,htp_arch=75", plug_in.display());
                let row =
                    row(format!("QNN 2.7.0, Hexagon's simulator, ONNX Runtime {version}"), library, Some(accelerator));
                let all = *version == VERSIONS[VERSIONS.len() - 1];
                rows.push(Row { dialects: if all { &DIALECTS } else { &["portable"] }, ..row });
            }
        }
        Err(error) => skipped.push(format!("QNN: {error:#}")),
    }
    (rows, skipped)
}

/// What takes a graph, or seems to, and makes nothing of it or rubbish; and why the rest cannot be run.
fn liars() -> (Vec<Liar>, Vec<String>) {
    let row = |library: PathBuf, accelerator: String| Row {
        name: "a liar".into(),
        library,
        accelerator: Some(accelerator),
        variables: vec![],
        dialects: &[],
    };
    let newest = || library(VERSIONS[VERSIONS.len() - 1]);
    let no_device = || -> Result<Row> {
        ensure!(!Path::new("/dev/dri").exists(), "this machine has a GPU");
        let mut row = row(newest()?, format!("webgpu={}", webgpu()?.display()));
        row.variables.push(("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "0".into()));
        Ok(row)
    };
    let ggml = |library: Result<PathBuf>| -> Result<Row> {
        linux_x86_64()?;
        let plug_in = package(GGML)?.join("onnxruntime_ggml").join("lib").join("libonnxruntime_ggml.so");
        Ok(row(library?, format!("custom={}", plug_in.display())))
    };
    let (mut liars, mut skipped) = (Vec::new(), Vec::new());
    for (what, row, file, step) in [
        (
            "OpenVINO 1.24.1 takes native fp16, runs it without an error, and gives rubbish",
            openvino().map(|library| row(library, "openvino:CPU".into())),
            "native-fp16",
            "Probe",
        ),
        (
            "QNN with a backend whose library is missing makes a session, and takes nothing",
            newest().and_then(|library| Ok(row(library, format!("qnn={},backend_type=cpu", qnn()?.display())))),
            "portable-fp32",
            "Assignment",
        ),
        (
            "QNN passes over an option that it does not know",
            newest().and_then(|library| {
                Ok(row(library, format!("qnn={},soc_model=57,vtcm_megabytes=8", qnn()?.display())))
            }),
            "portable-fp32",
            "Session",
        ),
        (
            "A plug-in without a device, which ONNX Runtime would silently replace by the processor",
            no_device(),
            "portable-fp32",
            "Device",
        ),
        ("ggml's plug-in claims every node, and fails when it runs", ggml(newest()), "portable-fp32", "Probe"),
        (
            "ggml's plug-in in ONNX Runtime 1.24.4, where it asks for 1.29",
            ggml(library(VERSIONS[0])),
            "portable-fp32",
            "Device",
        ),
    ] {
        match row {
            Ok(row) => liars.push(Liar { what, row, file, step }),
            Err(error) => skipped.push(format!("{what}: {error:#}")),
        }
    }
    (liars, skipped)
}

/// Python with ncnn, and pnnx.
fn ncnn() -> Result<[PathBuf; 2]> {
    linux_x86_64()?;
    let python = venv::made(&setup::root().join(".cache").join("ncnn"), &NCNN, "ncnn (40 MB)")?;
    Ok([python, package(PNNX)?.join("pnnx").join("pnnx")])
}

fn library(version: &str) -> Result<PathBuf> {
    let folder = setup::root().join(".cache").join(format!("onnxruntime-{version}"));
    Ok(onnxruntime::find_or_fetch_version(&folder, version)?.path)
}

fn openvino() -> Result<PathBuf> {
    linux_x86_64()?;
    Ok(package(OPENVINO)?.join("onnxruntime").join("capi").join("libonnxruntime.so.1.24.1"))
}

fn qnn() -> Result<PathBuf> {
    linux_x86_64()?;
    Ok(package(QNN)?.join("onnxruntime_qnn").join("libonnxruntime_providers_qnn.so"))
}

fn webgpu() -> Result<PathBuf> {
    linux_x86_64()?;
    Ok(package(WEBGPU)?.join("onnxruntime_ep_webgpu").join("libonnxruntime_providers_webgpu.so"))
}

fn linux_x86_64() -> Result<()> {
    let here = cfg!(all(target_os = "linux", target_arch = "x86_64"));
    ensure!(here, "its package is taken for Linux on x86-64 alone");
    Ok(())
}

fn package((requirement, size): (&str, &str)) -> Result<PathBuf> {
    venv::unpacked(&setup::root().join(".cache").join("edge"), requirement, size)
}

/// The description of Mesa's driver that draws on the processor: the user's own, or where systems keep it.
fn software_vulkan() -> Option<String> {
    if let Some(named) = env::var_os("VK_ICD_FILENAMES").filter(|named| !named.is_empty()) {
        return named.into_string().ok();
    }
    let entries = fs::read_dir("/usr/share/vulkan/icd.d").ok()?;
    let mut found = entries.flatten().map(|entry| entry.path());
    let is_lavapipe =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("lvp_icd"));
    found.find(is_lavapipe)?.into_os_string().into_string().ok()
}

fn page(table: &str, caught: &str, skipped: &[String]) -> Result<String> {
    let date = Command::new(onnxruntime::python_with_pip()?)
        .args(["-c", "import datetime; print(datetime.date.today().isoformat())"])
        .output()
        .context("Python does not tell the date")?;
    let date = String::from_utf8_lossy(&date.stdout).trim().to_owned();
    let head = PRECISIONS.map(|precision| format!(" {precision} |")).concat();
    let line = PRECISIONS.map(|_| "---|").concat();
    let skipped = match skipped.is_empty() {
        true => String::new(),
        false => format!("\nNot run this time: {}.\n", skipped.join("; ")),
    };
    Ok(format!(
        "# Accelerators, as measured\n\n\
         Written by `cargo xtask edge-test` on {date}, on {} {}. The teacher `emoji-16` as a generator (16 × 16, seven \
         classes), each run in a process of its own. A cell has the nodes that the accelerator took of all that ONNX \
         Runtime runs, and the greatest difference of its picture to the processor's of the same file, where pictures are \
         in [-1, 1]. \"no\" names the step at which `dmd-runtime` passed it over; the processor then runs the file.\n\n\
         | accelerator | dialect |{head}\n|---|---|{line}\n{table}{skipped}\n\
         ## What lies, and how it is found out\n\n{caught}\n\
         ## Compiled, and not run here\n\n\
         Core ML, NNAPI, XNNPACK, DirectML, CUDA and TensorRT: `dmd-runtime` asks a library for them, and holds them to the \
         same proof, but no machine of the project has had them. Hexagon's simulator tells the numbers of a device, not \
         its times; WebGPU ran on Mesa's software driver.\n",
        env::consts::OS,
        env::consts::ARCH,
    ))
}
