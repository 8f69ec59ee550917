//! The command line of `cargo xtask`, parsed by hand: a parser crate would double the time to the first task.

use std::ffi::OsString;

use anyhow::{Result, bail};

pub const HELP: &str = "\
Set-up and chores of this project.

Usage: cargo xtask <TASK> [ARGS]

  setup [--no-onnxruntime]  prepare this checkout: protoc from a crate, ONNX Runtime's library through Python's pip
  demo [ARGS]               set up, build, distil a small model, export it, run it, and show the pictures
  test [ARGS]               set up and run every test; ARGS go to cargo test
  bench [ARGS]              training beside PyTorch, in turn, as ratios; fetches PyTorch (5 GB); --against-torch may be
                            given and is the default, as there is no other comparison; --help lists ARGS
  cuda-check                compile and link for CUDA, and check the GPU's tests, with a toolkit from Python's package
                            index (3 GB); needs no GPU
  web-test                  the browser example in a headless Chromium; needs Node, and fetches packages with npm
  export-test               the tests of exported files in the oldest and the newest ONNX Runtime that are promised, and in
                            ONNX's own checker, fetched through Python's pip (140 MB)
  bindings-test             the runtime from Python, Kotlin and Swift, each where its tools are here: fetches numpy and
                            hatchling through Python's pip and Kotlin's compiler with npm (160 MB)
  server-test               the example of a web service, in ONNX Runtime; fetches crates
  edge-test [--quick]       exported files on OpenVINO, WebGPU on the processor and the simulator of Qualcomm's Hexagon, fetched
                            through Python's pip (300 MB); writes docs/edge.md, or runs the plainest file alone
  fuzz [--seconds N] [--quick] [TARGET…]
                            every reader of bytes from outside on bytes changed at random, N seconds each (60); needs a C++
                            compiler, and fetches cargo-fuzz. --quick leaves out engines and the trainer's own readers,
                            which take minutes to build
                            (the seven above with --fetch: fetch what they need and no more)
  bench-export              exported files beside PyTorch and torch.onnx.export's; fetches PyTorch (5 GB) unless a virtual
                            environment that has it is active
  check                     formatting, clippy and documentation, warnings refused
  ci                        check, then test
  dmd [ARGS]                run dmd as it was last built for release (built first where there is none)
  lab [ARGS]                make a table, plot or experiment of docs/
  env                       print the environment for a shell: eval \"$(cargo xtask env)\"

PROTOC and ORT_DYLIB_PATH are used as they are where you have set them. Without ONNX Runtime's library, exported
files run in tract, which needs nothing and is slower.
";

/// One thing to do, with the arguments that go on to the program it starts.
#[derive(Debug, PartialEq)]
pub enum Task {
    Help,
    Setup { onnxruntime: bool },
    Demo(Vec<OsString>),
    Test(Vec<OsString>),
    Bench(Vec<OsString>),
    CudaCheck { fetch_only: bool },
    WebTest { fetch_only: bool },
    ExportTest { fetch_only: bool },
    BindingsTest { fetch_only: bool },
    ServerTest { fetch_only: bool },
    EdgeTest { fetch_only: bool, quick: bool },
    Fuzz { fetch_only: bool, quick: bool, seconds: u32, targets: Vec<String> },
    BenchExport,
    Check,
    Ci,
    Dmd(Vec<OsString>),
    Lab(Vec<OsString>),
    Env,
}

/// Reads the arguments after the program's name. Those of `demo`, `test`, `bench` and `dmd` belong to the program behind it.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Task> {
    let mut args = args.into_iter();
    let Some(task) = args.next() else { return Ok(Task::Help) };
    let args: Vec<OsString> = args.collect();
    let task = task.to_string_lossy();
    match task.as_ref() {
        "demo" => return Ok(Task::Demo(args)),
        "test" => return Ok(Task::Test(args)),
        "bench" => return Ok(Task::Bench(args)),
        "dmd" => return Ok(Task::Dmd(args)),
        "lab" => return Ok(Task::Lab(args)),
        "help" | "--help" | "-h" => return Ok(Task::Help),
        _ if args.iter().any(|arg| arg == "--help" || arg == "-h") => return Ok(Task::Help),
        "setup" => return parse_setup(&args),
        "fuzz" => return parse_fuzz(&args),
        _ => {}
    }
    let fetch_only = args == ["--fetch"];
    match task.as_ref() {
        "cuda-check" if fetch_only || args.is_empty() => return Ok(Task::CudaCheck { fetch_only }),
        "web-test" if fetch_only || args.is_empty() => return Ok(Task::WebTest { fetch_only }),
        "export-test" if fetch_only || args.is_empty() => return Ok(Task::ExportTest { fetch_only }),
        "bindings-test" if fetch_only || args.is_empty() => return Ok(Task::BindingsTest { fetch_only }),
        "server-test" if fetch_only || args.is_empty() => return Ok(Task::ServerTest { fetch_only }),
        "edge-test" if fetch_only || args.is_empty() || args == ["--quick"] => {
            return Ok(Task::EdgeTest { fetch_only, quick: args == ["--quick"] });
        }
        "edge-test" => bail!("cargo xtask edge-test takes only --fetch or --quick, found {:?}", args[0]),
        "cuda-check" | "web-test" | "export-test" | "bindings-test" | "server-test" => {
            bail!("cargo xtask {task} takes only --fetch, found {:?}", args[0])
        }
        _ => {}
    }
    let parsed = match task.as_ref() {
        "bench-export" => Task::BenchExport,
        "check" => Task::Check,
        "ci" => Task::Ci,
        "env" => Task::Env,
        _ => bail!("unknown task {task:?}; cargo xtask --help lists them"),
    };
    match args.first() {
        Some(arg) => bail!("cargo xtask {task} takes no arguments, found {arg:?}"),
        None => Ok(parsed),
    }
}

fn parse_setup(args: &[OsString]) -> Result<Task> {
    match args.iter().find(|arg| *arg != "--no-onnxruntime") {
        Some(arg) => bail!("cargo xtask setup takes only --no-onnxruntime, found {arg:?}"),
        None => Ok(Task::Setup { onnxruntime: args.is_empty() }),
    }
}

fn parse_fuzz(args: &[OsString]) -> Result<Task> {
    let (mut fetch_only, mut quick, mut seconds, mut targets) = (false, false, 60, vec![]);
    let mut args = args.iter().map(|arg| arg.to_string_lossy());
    while let Some(arg) = args.next() {
        match arg.as_ref() {
            "--fetch" => fetch_only = true,
            "--quick" => quick = true,
            "--seconds" => match args.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0) {
                Some(n) => seconds = n,
                None => bail!("cargo xtask fuzz --seconds takes a number of seconds, 1 or more"),
            },
            option if option.starts_with('-') => {
                bail!("cargo xtask fuzz takes --seconds N, --quick and --fetch, found {option:?}")
            }
            target => targets.push(target.into()),
        }
    }
    Ok(Task::Fuzz { fetch_only, quick, seconds, targets })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: Result<Task, &str>) {
        let parsed = parse(line.split_whitespace().map(OsString::from));
        assert_eq!(parsed.map_err(|error| error.to_string()), expected.map_err(String::from), "{line:?}");
    }

    #[test]
    fn setup_and_plain_tasks_are_read() {
        check("", Ok(Task::Help));
        check("--help", Ok(Task::Help));
        check("setup", Ok(Task::Setup { onnxruntime: true }));
        check("setup --no-onnxruntime", Ok(Task::Setup { onnxruntime: false }));
        check("setup --help", Ok(Task::Help));
        check("cuda-check", Ok(Task::CudaCheck { fetch_only: false }));
        check("cuda-check --fetch", Ok(Task::CudaCheck { fetch_only: true }));
        check("cuda-check --fetch", Ok(Task::CudaCheck { fetch_only: true }));
        check("web-test", Ok(Task::WebTest { fetch_only: false }));
        check("export-test --fetch", Ok(Task::ExportTest { fetch_only: true }));
        check("bindings-test", Ok(Task::BindingsTest { fetch_only: false }));
        check("server-test", Ok(Task::ServerTest { fetch_only: false }));
        check("edge-test", Ok(Task::EdgeTest { fetch_only: false, quick: false }));
        check("edge-test --quick", Ok(Task::EdgeTest { fetch_only: false, quick: true }));
        check("edge-test --fetch", Ok(Task::EdgeTest { fetch_only: true, quick: false }));
        let fuzz = |fetch_only, quick, seconds, targets: &[&str]| {
            let targets = targets.iter().map(|target| target.to_string()).collect();
            Ok(Task::Fuzz { fetch_only, quick, seconds, targets })
        };
        check("fuzz", fuzz(false, false, 60, &[]));
        check("fuzz --fetch", fuzz(true, false, 60, &[]));
        check("fuzz --quick --seconds 600 onnx ort", fuzz(false, true, 600, &["onnx", "ort"]));
        check("bench-export", Ok(Task::BenchExport));
        check("check", Ok(Task::Check));
        check("ci", Ok(Task::Ci));
        check("env", Ok(Task::Env));
    }

    #[test]
    fn arguments_of_the_program_behind_pass_untouched() {
        let args = |line: &str| line.split_whitespace().map(OsString::from).collect();
        check("demo --steps 5 --json", Ok(Task::Demo(args("--steps 5 --json"))));
        check("test -p dmd -- --nocapture", Ok(Task::Test(args("-p dmd -- --nocapture"))));
        check("bench --against-torch --rounds 1", Ok(Task::Bench(args("--against-torch --rounds 1"))));
        check("dmd --help", Ok(Task::Dmd(args("--help"))));
    }

    #[test]
    fn wrong_usage_names_the_argument() {
        check("tset", Err("unknown task \"tset\"; cargo xtask --help lists them"));
        check("web-test --page", Err("cargo xtask web-test takes only --fetch, found \"--page\""));
        check("edge-test --all", Err("cargo xtask edge-test takes only --fetch or --quick, found \"--all\""));
        check("fuzz --seconds 0", Err("cargo xtask fuzz --seconds takes a number of seconds, 1 or more"));
        check("fuzz --jobs", Err("cargo xtask fuzz takes --seconds N, --quick and --fetch, found \"--jobs\""));
        check("ci --fast", Err("cargo xtask ci takes no arguments, found \"--fast\""));
        check("setup --onnx", Err("cargo xtask setup takes only --no-onnxruntime, found \"--onnx\""));
    }
}
