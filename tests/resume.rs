//! A run that was interrupted ends with the same bytes as one that was not, however it was interrupted.
#![cfg(unix)] // signals, and a shell that limits the size of files

mod common;
use common::{Workplace, check_failure, stderr, without_times, without_times_in};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const DISTILL: &str = "distill --teacher teacher --config distill.toml --batch 2 --device cpu --out";
const TEACH: &str = "teacher train --data pictures --config teacher.toml --batch 2 --device cpu --out";

fn distillation(steps: u64) -> Workplace {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.write(
        "distill.toml",
        format!("steps = {steps}\nratio = 2\nlog_every = 1\nsample_every = 50\ncheckpoint_every = 16\n"),
    );
    w
}

/// Everything that a run left, but for the time that lines took.
fn outcome(w: &Workplace, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = w.snapshot(run);
    // Which earlier checkpoint is kept beside the last one depends on where a run stopped.
    let mut kept: Vec<PathBuf> =
        files.keys().filter(|p| p.parent().is_some_and(|f| f.ends_with("checkpoints"))).cloned().collect();
    let last = kept.pop().unwrap();
    files.retain(|path, _| !kept.iter().any(|old| *old != last && path.starts_with(old)));
    without_times_in(&mut files);
    files
}

fn assert_same(w: &Workplace, run: &str, whole: &str) {
    let (found, expected) = (outcome(w, run), outcome(w, whole));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (path, bytes) in &expected {
        assert!(found[path] == *bytes, "{run}: {} differs from the run in one go", path.display());
    }
}

/// Runs a line until its metrics have `lines` more lines than now, then sends the signal.
fn interrupt(w: &Workplace, line: &str, metrics: &str, lines: usize, signal: &str) -> Output {
    let n_lines = || std::fs::read(w.path(metrics)).map_or(0, |bytes| bytes.iter().filter(|b| **b == b'\n').count());
    let (goal, started) = (n_lines() + lines, Instant::now());
    let mut child = w.command(line).spawn().unwrap();
    // A resumed run first takes back the lines after its checkpoint.
    while n_lines() < goal {
        if child.try_wait().unwrap().is_some() {
            return child.wait_with_output().unwrap(); // over already
        }
        assert!(started.elapsed() < Duration::from_secs(60), "dmd {line}: no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Not yet waited for, so the number is still its own, even where it has just ended.
    Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).output().unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_distillation_in_pieces_equals_one_in_one_go() {
    let w = distillation(70);
    w.ok(&format!("{DISTILL} whole"));

    // Asked to stop, it saves where it stands and says how to go on.
    let output = interrupt(&w, &format!("{DISTILL} term"), "term/metrics.jsonl", 5, "TERM");
    check_failure("distill", &output, 1, &["interrupted at step", "run the same command again to continue"]);
    let message = common::stderr(&w.run(&format!("{DISTILL} term")));
    assert!(message.contains("continuing from step"), "{message}");
    assert_same(&w, "term", "whole");

    // Killed, it goes back to the last checkpoint: once before the first, then after one.
    for lines in [3, 20] {
        let output = interrupt(&w, &format!("{DISTILL} kill"), "kill/metrics.jsonl", lines, "KILL");
        assert_eq!(output.status.code(), None, "{}", stderr(&output));
    }
    w.ok(&format!("{DISTILL} kill"));
    assert_same(&w, "kill", "whole");

    // In many small pieces, stopped and killed in turn.
    let mut n_pieces = 1;
    while !interrupt(&w, &format!("{DISTILL} pieces"), "pieces/metrics.jsonl", 18, ["KILL", "TERM"][n_pieces % 2])
        .status
        .success()
    {
        n_pieces += 1;
        assert!(n_pieces < 100, "no progress in {n_pieces} pieces");
    }
    assert!(n_pieces > 2, "the run was over before it could be interrupted");
    let times = w.text("pieces/metrics.jsonl");
    let times: Vec<f64> =
        times.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["elapsed_s"].as_f64().unwrap()).collect();
    assert!(times.is_sorted(), "the time of training began anew: {times:?}");
    assert_same(&w, "pieces", "whole");

    // A finished run is finished: the same command changes nothing.
    w.ok(&format!("{DISTILL} whole"));
    assert_same(&w, "term", "whole");
}

/// Everything at once: guided few-step student of two averages, every term, critic that shares samples, in parts.
const EVERYTHING: &str = r#"
steps = 40
ratio = 2
accumulate = 2
samples = "shared"
log_every = 1
sample_every = 50
checkpoint_every = 8
[generator]
steps = [2.5, 0.8]
ema = [0.9, 0.99]
decay = "linear"
[real_score]
guidance_scale = 1.5
[loss]
scores = "distribution-matching"
divergence = "jensen-shannon"
ratio_memory = 0.5
[loss.regression]
weight = 0.25
[loss.gan]
weight = 3e-3
critic_weight = 1e-2
r1 = 1.0
start_step = 4
resolutions = 2
"#;

#[test]
fn a_distillation_with_every_term_in_pieces_equals_one_in_one_go() {
    let w = Workplace::new().with_pictures().with_fixture("edm-tiny");
    // The third class becomes "no class".
    w.write(
        "teacher/dmd.json",
        r#"{"kind": "teacher", "version": "", "classes": ["blue", "red"], "null_class": true}"#,
    );
    w.write("distill.toml", EVERYTHING);
    w.ok("pairs teacher --out pairs -n 10 --steps 2 --per-shard 4 --guidance 1.5");
    let line = format!("{DISTILL} RUN --data pictures --pairs pairs");
    let whole = w.ok(&line.replace("RUN", "whole"));
    for number in ["loss_dm", "loss_fake", "loss_gan", "loss_discriminator", "loss_regression", "d_real", "h_max"] {
        assert!(whole[number].as_f64().is_some_and(f64::is_finite), "{number} in {whole}");
    }
    let pieces = line.replace("RUN", "pieces");
    for (lines, signal) in [(3, "TERM"), (12, "KILL"), (6, "TERM")] {
        interrupt(&w, &pieces, "pieces/metrics.jsonl", lines, signal);
    }
    w.ok(&pieces);
    assert_same(&w, "pieces", "whole");
    assert!(w.path("whole/generator-ema-0.99/unet").is_dir());

    // The generator of two passes draws, and says what it is; a second stage starts from the first, critic and all.
    let drawn = w.ok("sample whole/generator --npy few.npy -n 4 --batch 3");
    assert_eq!(drawn["model"], "the generator (2 steps)");
    w.ok("sample whole/generator --npy again.npy -n 4");
    assert!(common::max_difference(&w.npy("few.npy"), &w.npy("again.npy")) < 1e-5);
    w.ok("sample whole/generator --npy other.npy -n 4 --seed 1");
    assert!(common::max_difference(&w.npy("few.npy"), &w.npy("other.npy")) > 1e-3);
    w.ok("distill --teacher teacher --out stage2 --steps 1 --batch 2 --start whole --set ratio=1 --set generator.rate=1e-9");
    let gap = |a: &str, b: &str| {
        w.ok(&format!("sample {a} --npy a.npy --force"));
        w.ok(&format!("sample {b} --npy b.npy --force"));
        common::max_difference(&w.npy("a.npy"), &w.npy("b.npy"))
    };
    w.edit_json("whole/generator/dmd.json", |about| _ = about.as_object_mut().unwrap().remove("steps"));
    assert!(gap("stage2/generator", "whole/generator") < 1e-4);
}

/// A run in trouble goes back to its last checkpoint and on at lower rates, as often as it may, then stops.
#[test]
fn a_run_in_trouble_returns_to_its_checkpoint() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let settings = "steps = 60\nratio = 1\ncheckpoint_every = 1\n[guards]\nskip = 0\nreturns = 3\n[generator]\nrate = 1e6\nwarmup = 20\n[fake_score]\nrate = 1e6\nwarmup = 20\n";
    w.write("distill.toml", settings);
    let message =
        w.fails(&format!("{DISTILL} run"), 1, &["the run stops here", "at 0.5 of the rates", "at 0.125 of the rates"]);
    assert_eq!(message.matches("going on from step").count(), 3, "{message}");
}

/// Rates that are far too high while they warm up: at half of them the run goes through. Without skipping, and with it,
/// where checkpoints in the middle of trouble would only lead back into it.
#[test]
fn a_run_recovers_at_lower_rates() {
    for skip in [0, 5] {
        let w = Workplace::new().with_fixture("edm-tiny");
        let settings = format!(
            "steps = 60\nratio = 1\ncheckpoint_every = 2\n[guards]\nskip = {skip}\nreturns = 4\n[generator]\nrate = 1e3\nwarmup = 60\n[fake_score]\nrate = 1e3\nwarmup = 60\n"
        );
        w.write("distill.toml", &settings);
        let result = w.ok(&format!("{DISTILL} run --recipe plain"));
        assert_eq!(result["steps"], 60);
        let skipped = result["skipped"].as_u64().unwrap();
        assert_eq!(skipped > 0, skip > 0, "{skipped}");
    }
}

#[test]
fn a_teacher_in_pieces_equals_one_in_one_go() {
    let w = Workplace::new().with_pictures();
    w.write("teacher.toml", "steps = 40\nsize = [8, 8]\nunet = \"unet.json\"\nlog_every = 1\ncheckpoint_every = 16\nwarmup = 5\nflip = true\n");
    w.ok(&format!("{TEACH} whole"));
    let output = interrupt(&w, &format!("{TEACH} pieces"), "pieces/training/metrics.jsonl", 4, "TERM");
    check_failure("teacher train", &output, 1, &["interrupted at step"]);
    let output = interrupt(&w, &format!("{TEACH} pieces"), "pieces/training/metrics.jsonl", 20, "KILL");
    assert_eq!(output.status.code(), None, "{}", stderr(&output));
    w.ok(&format!("{TEACH} pieces"));
    let only_whole = |mut files: BTreeMap<PathBuf, Vec<u8>>| -> BTreeMap<PathBuf, Vec<u8>> {
        without_times_in(&mut files);
        // Where it was interrupted there is a grid and a checkpoint more.
        files
            .into_iter()
            .filter(|(path, _)| path.starts_with("unet") || path.to_string_lossy().contains("step-00000040"))
            .collect()
    };
    let (found, expected) = (only_whole(w.snapshot("pieces")), only_whole(w.snapshot("whole")));
    assert!(expected.len() > 5);
    assert!(found == expected, "the interrupted teacher differs");
    assert_eq!(
        without_times(&w.text("pieces/training/metrics.jsonl")),
        without_times(&w.text("whole/training/metrics.jsonl"))
    );
}

/// Killed between its last checkpoint and the model folder, a finished run still ends with its model.
#[test]
fn a_finished_run_writes_its_model_again_where_it_is_missing() {
    let w = Workplace::new().with_pictures();
    w.write("teacher.toml", "steps = 2\nsize = [8, 8]\nunet = \"unet.json\"\n");
    w.write("distill.toml", "steps = 1\nratio = 1\n");
    for (line, model) in [(format!("{TEACH} teacher"), "teacher/unet"), (format!("{DISTILL} run"), "run/generator")] {
        w.ok(&line);
        let before = w.snapshot(model);
        std::fs::remove_dir_all(w.path(model)).unwrap();
        w.ok(&line);
        assert!(w.snapshot(model) == before, "{model}");
    }
}

#[test]
fn another_seed_gives_other_weights() {
    let w = distillation(2);
    w.ok(&format!("{DISTILL} a"));
    w.ok(&format!("{DISTILL} b --seed 1"));
    let weights = "generator/unet/diffusion_pytorch_model.safetensors";
    assert!(std::fs::read(w.path("a").join(weights)).unwrap() != std::fs::read(w.path("b").join(weights)).unwrap());
}

#[test]
fn a_run_is_not_continued_with_other_settings_or_another_teacher() {
    let w = distillation(2);
    w.ok(&format!("{DISTILL} run"));
    w.refuses(
        &format!("{DISTILL} run --seed 1"),
        1,
        &["run: holds a run with other settings (seed is 1, was 0)", "--force"],
    );
    w.refuses(&format!("{DISTILL} run --set ratio=1 --seed 1"), 1, &["seed is 1, was 0", "ratio is 1, was 2"]);
    w.refuses(&format!("{DISTILL} run --steps 1"), 1, &["run: is at step 2, beyond steps (1)"]);
    w.write(
        "distill.toml",
        "steps = 2\nratio = 2\nlog_every = 1\nsample_every = 50\ncheckpoint_every = 16\n[generator]\nsigma = \"max\"\n",
    );
    w.refuses(&format!("{DISTILL} run"), 1, &["generator.sigma is \"max\", was 2.5"]);

    // The teacher may move; it may not change, neither in its weights nor in what they mean.
    let w = distillation(2);
    w.ok(&format!("{DISTILL} run"));
    w.copy("teacher", "moved");
    w.ok(&format!("{DISTILL} run --teacher moved").replace("--teacher teacher ", ""));
    w.edit_json("teacher/scheduler/scheduler_config.json", |scheduler| scheduler["sigma_data"] = json!(0.6));
    w.refuses(&format!("{DISTILL} run"), 1, &["another teacher", "--force"]);
    let weights = "teacher/unet/diffusion_pytorch_model.safetensors";
    let mut bytes = std::fs::read(w.path("moved/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    w.copy("moved", "teacher");
    w.write(weights, bytes);
    w.refuses(&format!("{DISTILL} run"), 1, &["another teacher"]);
    w.ok(&format!("{DISTILL} run --force"));
}

/// A limit on the size of a file, set while the run goes on, stands for a disk that fills up: the write of a checkpoint
/// fails in the middle. Before any was written, the message speaks of none.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_during_a_checkpoint_costs_only_the_steps_since_the_last_one() {
    let w = distillation(40);
    w.ok(&format!("{DISTILL} whole"));
    // The generator's own part still fits, the optimiser's, twice as large, does not.
    let part = |name: &str| w.path("whole/checkpoints/step-00000040").join(name).metadata().unwrap().len();
    let largest = (part("generator.safetensors") + part("optimizer_generator.safetensors")) / 2;
    let fill_up = |line: &str| {
        // What is ignored stays so in what a shell begins.
        let mut command = Command::new("sh");
        command.current_dir(w.path("")).args(["-c", "trap '' XFSZ; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_dmd")]);
        command.args(["--threads", "1"]).args(line.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::piped());
        let n_lines = || std::fs::read(w.path("run/metrics.jsonl")).map_or(0, |text| text.len());
        let before = n_lines();
        let mut child = command.spawn().unwrap();
        while n_lines() == before {
            assert!(child.try_wait().unwrap().is_none(), "the run was over before its disk was full");
            std::thread::sleep(Duration::from_millis(1));
        }
        let limit = libc::rlimit { rlim_cur: largest, rlim_max: largest };
        // SAFETY: it reads the limit, which outlives the call.
        assert_eq!(unsafe { libc::prlimit(child.id() as i32, libc::RLIMIT_FSIZE, &limit, std::ptr::null_mut()) }, 0);
        child.wait_with_output().unwrap()
    };
    let line = format!("{DISTILL} run --set log_every=1");
    let message = check_failure(&line, &fill_up(&line), 1, &["could not be written; there is none before it"]);
    assert!(!message.contains("is whole"), "{message}");
    assert_eq!(std::fs::read_dir(w.path("run/checkpoints")).unwrap().count(), 0);

    check_failure("distill", &interrupt(&w, &line, "run/metrics.jsonl", 2, "TERM"), 1, &["interrupted"]);
    let before = w.snapshot("run/checkpoints");
    check_failure(&line, &fill_up(&line), 1, &["the checkpoint of step", "could not be written; that of step"]);
    assert!(w.snapshot("run/checkpoints") == before, "the checkpoint before was touched, or a broken one was left");
    w.ok(&line);
    assert_same(&w, "run", "whole");
}

/// A shell's limit on the size of a file, as there is on a small disk.
#[cfg(target_os = "linux")]
#[test]
fn a_run_whose_checkpoint_has_no_room_does_not_begin() {
    let w = distillation(2);
    let line = format!("{DISTILL} run");
    let mut command = Command::new("sh");
    command.current_dir(w.path("")).args(["-c", "trap '' XFSZ; ulimit -f 60; exec \"$@\"", "sh"]);
    command.arg(env!("CARGO_BIN_EXE_dmd")).args(line.split_whitespace());
    let message = check_failure(
        &line,
        &command.output().unwrap(),
        1,
        &["run: make room, or give another --out: there is no room for a checkpoint of 0.5 MB"],
    );
    assert!(!message.contains("step"), "{message}");
    w.ok(&line);
}

/// A second process is refused by the name of the first, which is left alone.
#[test]
fn a_folder_belongs_to_one_process() {
    let w = distillation(70).with_pictures();
    w.write("teacher.toml", "steps = 400\nsize = [8, 8]\nunet = \"unet.json\"\nlog_every = 1\n");
    for (line, sign, model) in [
        (format!("{DISTILL} run"), "run/metrics.jsonl", "run/generator"),
        (format!("{TEACH} new"), "new/training/metrics.jsonl", "new/unet"),
        ("pairs teacher --out pairs -n 400 --steps 18 --per-shard 1".into(), "pairs/shard-00001.safetensors", "pairs"),
    ] {
        let mut first = w.command(&line).spawn().unwrap();
        while !w.path(sign).exists() {
            assert!(first.try_wait().unwrap().is_none(), "dmd {line}: over too soon");
            std::thread::sleep(Duration::from_millis(1));
        }
        for line in [line.clone(), format!("{line} --force")] {
            check_failure(&line, &w.run(&line), 1, &[&format!("in use by process {} on ", first.id())]);
        }
        let output = first.wait_with_output().unwrap();
        assert!(output.status.success(), "dmd {line}: {}", stderr(&output));
        assert!(w.path(model).is_dir());
    }
    assert_eq!(w.text("run/metrics.jsonl").lines().count(), 70);
    assert_eq!(w.text("new/training/metrics.jsonl").lines().count(), 400);
}

#[test]
fn of_two_that_begin_at_once_one_goes_on() {
    let w = distillation(4);
    let line = format!("{DISTILL} run --recipe plain --set checkpoint_every=1");
    for pause in [0, 5, 10, 20, 40] {
        let first = w.command(&line).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(pause));
        let both = [w.command(&line).spawn().unwrap(), first].map(|child| child.wait_with_output().unwrap());
        assert!(both.iter().any(|output| output.status.success()), "{} {}", stderr(&both[0]), stderr(&both[1]));
        let parts =
            |step: u32| std::fs::read_dir(w.path(&format!("run/checkpoints/step-0000000{step}"))).unwrap().count();
        assert_eq!([3, 4].map(parts), [6; 2]);
        std::fs::remove_dir_all(w.path("run")).unwrap();
    }
}

/// Each kind of damage to the last checkpoint: the run goes back to the one before, says so, and ends the same.
#[test]
fn a_damaged_checkpoint_costs_the_steps_since_the_one_before() {
    let w = distillation(4);
    let line = format!("{DISTILL} run --set checkpoint_every=2");
    w.ok(&line);
    w.copy("run", "whole");
    let part = "run/checkpoints/step-00000004/optimizer_generator.safetensors";
    type Damage = fn(&mut Vec<u8>);
    let damage: [(&str, Damage); 4] = [
        (part, |bytes| bytes.truncate(1000)),
        (part, |bytes| *bytes.last_mut().unwrap() ^= 1),
        ("run/checkpoints/step-00000004/state.json", |bytes| bytes.truncate(20)),
        ("run/checkpoints/step-00000004/state.json", Vec::clear),
    ];
    for (name, change) in damage {
        let mut bytes = std::fs::read(w.path(name)).unwrap();
        change(&mut bytes);
        w.write(name, bytes);
        let output = w.run(&line);
        assert!(output.status.success(), "{}", stderr(&output));
        let message = stderr(&output);
        let parts = [name, "is damaged", "going back to the checkpoint before it", "continuing from step 2"];
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        assert_same(&w, "run", "whole");
    }
    std::fs::remove_file(w.path(part)).unwrap();
    std::fs::remove_dir_all(w.path("run/checkpoints/step-00000002")).unwrap();
    w.refuses(&line, 1, &["no checkpoint is whole; --force begins anew", part]);
    w.ok(&format!("{line} --force"));
}

/// Pictures, pairs and features may lie elsewhere; they may not be others.
#[test]
fn what_a_run_learns_from_is_known_by_its_content() {
    let w = Workplace::new().with_pictures().with_fixture("edm-tiny");
    w.write(
        "teacher/dmd.json",
        r#"{"kind": "teacher", "version": "", "classes": ["blue", "red"], "null_class": true}"#,
    );
    w.write("distill.toml", "steps = 2\nratio = 1\n");
    w.ok("pairs teacher --out pairs -n 4 --steps 2");
    w.ok("pairs teacher --out others -n 4 --steps 2 --seed 9");
    let features = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/features.onnx");
    for name in ["features.onnx", "same.onnx"] {
        w.write(name, std::fs::read(&features).unwrap());
    }
    w.write("other.onnx", [std::fs::read(&features).unwrap(), b"\x1a\x01x".to_vec()].concat());
    w.copy("pictures", "moved");
    w.copy("pairs", "moved-pairs");
    w.copy("pictures", "changed");
    std::fs::copy(w.path("changed/red/13.png"), w.path("changed/red/12.png")).unwrap();
    let line = |data: &str, pairs: &str, features: &str| {
        format!(
            "{DISTILL} run --recipe dmd2 --data {data} --pairs {pairs} --set loss.regression.weight=1 --set loss.regression.distance.onnx={features}"
        )
    };
    w.ok(&line("pictures", "pairs", "features.onnx"));
    w.ok(&line("moved", "moved-pairs", "same.onnx"));
    w.refuses(&line("changed", "pairs", "features.onnx"), 1, &["the run was started with other pictures", "--force"]);
    w.refuses(&line("pictures", "others", "features.onnx"), 1, &["the run was started with other pairs"]);
    w.refuses(&line("pictures", "pairs", "other.onnx"), 1, &["the run was started with other features"]);
}

#[test]
fn what_changes_no_weight_may_change_on_the_way() {
    let w = distillation(3);
    w.write(
        "distill.toml",
        w.text("distill.toml") + "[generator]\ndecay = \"constant\"\n[fake_score]\ndecay = \"constant\"\n",
    );
    let message = stderr(&w.run(&format!("{DISTILL} run --steps 2")));
    assert!(!message.contains("from here on"), "{message}");
    let changed = "--set log_every=2 --set sample_every=7 --set checkpoint_every=1";
    let message = stderr(&w.run(&format!("{DISTILL} run {changed}")));
    assert!(message.contains("from here on steps is 3, was 2") && !message.contains("log_every"), "{message}");
    assert!(w.text("run/config.toml").contains("log_every = 2"));
    assert_eq!(w.text("run/changes.jsonl"), "{\"is\":3,\"setting\":\"steps\",\"step\":2,\"was\":2}\n");
    w.ok(&format!("{DISTILL} whole"));
    let average =
        |run: &str| std::fs::read(w.path(run).join("checkpoints/step-00000003/generator_ema.safetensors")).unwrap();
    assert!(average("run") == average("whole"));
}

/// A run that diverged does what its message says: lower the rate and run again.
#[test]
fn a_run_that_diverged_goes_on_at_a_lower_rate() {
    let w = Workplace::new().with_pictures().with_fixture("edm-tiny");
    w.write("teacher.toml", "steps = 6\nsize = [8, 8]\nunet = \"unet.json\"\nwarmup = 0\ncheckpoint_every = 1\n");
    w.fails(&format!("{TEACH} new --rate 1e30"), 1, &["step 1: validation_loss is ", "give lower rates and run again"]);
    let output = w.run(&format!("{TEACH} new --rate 1e-4"));
    assert!(output.status.success(), "{}", stderr(&output));

    w.write(
        "distill.toml",
        "steps = 9\nratio = 1\ncheckpoint_every = 1\n[guards]\nskip = 0\n[generator]\nwarmup = 8\n",
    );
    w.fails(&format!("{DISTILL} run --set generator.rate=1e9"), 1, &["give lower rates and run again"]);
    let output = w.run(&format!("{DISTILL} run --set generator.rate=1e-4"));
    assert!(output.status.success(), "{}", stderr(&output));
}

/// More steps for a teacher that is done; at a constant rate they are those of a longer run.
#[test]
fn a_finished_teacher_is_trained_further() {
    let w = Workplace::new().with_pictures();
    w.write("teacher.toml", "size = [8, 8]\nunet = \"unet.json\"\ndecay = \"constant\"\n");
    w.ok(&format!("{TEACH} teacher --steps 2"));
    let output = w.run(&format!("{TEACH} teacher --steps 4"));
    assert!(stderr(&output).contains("from here on steps is 4, was 2"), "{}", stderr(&output));
    w.ok(&format!("{TEACH} whole --steps 4"));
    let weights = "unet/diffusion_pytorch_model.safetensors";
    let of = |folder: &str| {
        std::fs::read(w.path(folder).join("training/checkpoints/step-00000004/weights.safetensors")).unwrap()
    };
    assert!(of("teacher") == of("whole"));
    assert!(w.path("teacher").join(weights).exists());
}

#[test]
fn a_grid_that_is_missing_is_drawn_again() {
    let w = Workplace::new().with_pictures().with_fixture("edm-tiny");
    w.write("teacher.toml", "steps = 2\nsize = [8, 8]\nunet = \"unet.json\"\n");
    w.write("distill.toml", "steps = 2\nratio = 1\n");
    for (line, grid) in [
        (format!("{TEACH} new"), "new/training/samples/step-00000002.png"),
        (format!("{DISTILL} run"), "run/samples/step-00000002.png"),
    ] {
        w.ok(&line);
        let before = std::fs::read(w.path(grid)).unwrap();
        std::fs::remove_file(w.path(grid)).unwrap();
        w.ok(&line);
        assert!(std::fs::read(w.path(grid)).unwrap() == before, "{grid}");
    }
}

/// What the version before wrote by which its teachers and pictures are known; it wrote neither checksums nor times.
#[test]
fn runs_and_pairs_of_earlier_versions_go_on() {
    const TEACHER: &str = "f919e3be21340f8229c765bd0e6d27e4aca6369842f93b5bd747a0f57a552819";
    const PICTURES: &str = "895a7d89f524ba8925cb8ab9c37284671c4b0f33efab54ea82e304e3a293c757";
    let w = Workplace::new().with_pictures().with_fixture("edm-tiny");
    w.write("teacher.toml", "steps = 2\nsize = [8, 8]\nunet = \"unet.json\"\n");
    w.write("distill.toml", "steps = 2\nratio = 1\n");
    for (line, run, name, written) in [
        (format!("{TEACH} new"), "new/training", "data_sha256", PICTURES),
        (format!("{DISTILL} run"), "run", "teacher_sha256", TEACHER),
    ] {
        w.ok(&line);
        w.edit_json(&format!("{run}/checkpoints/step-00000002/state.json"), |state| {
            let state = state.as_object_mut().unwrap();
            state.retain(|key, _| key != "parts" && key != "elapsed_s");
            state[name] = json!(written);
        });
        std::fs::remove_file(w.path(run).join(".lock")).unwrap();
        w.ok(&format!("{line} --steps 3"));
        w.edit_json(&format!("{run}/checkpoints/step-00000003/state.json"), |state| {
            state[name] = json!(TEACHER.replace('f', "e"))
        });
        w.fails(&line, 1, &["the run was started"]);
    }
    w.ok("pairs teacher --out pairs -n 2 --steps 2");
    w.edit_json("pairs/pairs.json", |pairs| pairs["teacher_sha256"] = json!(TEACHER));
    assert_eq!(w.ok("pairs teacher --out pairs -n 2 --steps 2")["made"], 0);
    w.ok(&format!("{DISTILL} paired --recipe dmd --pairs pairs --steps 1"));
}

/// A log on a full disk, and a reader that went away.
#[test]
fn a_line_that_cannot_be_printed_ends_no_run() {
    let w = distillation(3);
    let full = || Stdio::from(OpenOptions::new().write(true).open("/dev/full").unwrap());
    let closed = || {
        let mut gone = Command::new("true").stdin(Stdio::piped()).spawn().unwrap();
        let pipe = gone.stdin.take().unwrap();
        gone.wait().unwrap();
        Stdio::from(pipe)
    };
    let run = |out: &str, stdout: Stdio, stderr: Stdio| {
        w.command(&format!("--json {DISTILL} {out}")).stdout(stdout).stderr(stderr).output().unwrap()
    };
    for (out, stderr) in [("full", full()), ("closed", closed())] {
        let output = run(out, Stdio::piped(), stderr);
        assert_eq!(output.status.code(), Some(0), "{out}");
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["steps"], 3);
        assert!(w.path(out).join("generator/unet").is_dir());
    }
    // Of a result that nobody reads nobody hears; one that is lost is an error, after the work.
    let output = run("unread", closed(), Stdio::piped());
    assert!(output.status.success() && !stderr(&output).contains("stdout"), "{}", stderr(&output));
    check_failure("distill", &run("lost", full(), Stdio::piped()), 1, &["error: stdout cannot be written to: "]);
    assert!(w.path("lost/generator/unet").is_dir());
    let shown = w.command("config show").stdout(closed()).output().unwrap();
    assert!(shown.status.success() && shown.stderr.is_empty(), "{}", stderr(&shown));
    check_failure("config show", &w.command("config show").stdout(full()).output().unwrap(), 1, &["stdout"]);
}

/// The kernel and the shell both tell of a closed terminal; `nohup` asks not to be told.
#[test]
fn a_closed_terminal_saves_a_run_and_nohup_keeps_it_going() {
    let w = distillation(70);
    let run = |words: &[&str]| {
        let mut command = Command::new(words[0]);
        let dmd = [env!("CARGO_BIN_EXE_dmd"), "--threads", "1"];
        command.current_dir(w.path("")).args(&words[1..]).args(dmd).args(format!("{DISTILL} run").split_whitespace());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while std::fs::read(w.path("run/metrics.jsonl")).map_or(0, |lines| lines.len()) < 500 {
            assert!(started.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(1));
        }
        for _ in 0..2 {
            Command::new("kill").args(["-HUP", &child.id().to_string()]).output().unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        child.wait_with_output().unwrap()
    };
    check_failure("distill", &run(&["env"]), 1, &["interrupted at step", "run the same command again to continue"]);
    assert_eq!(std::fs::read_dir(w.path("run/checkpoints")).unwrap().count(), 1);
    w.ok(&format!("{DISTILL} run"));
    std::fs::remove_dir_all(w.path("run")).unwrap();
    let output = run(&["nohup"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn weights_that_an_update_ruined_reach_no_checkpoint() {
    let w = Workplace::new().with_fixture("edm-tiny");
    // A rate beyond f32: the gradient is a number, and what the update makes of the weights is none.
    let line = "distill --teacher teacher --out run --steps 1 --batch 2 --set ratio=1 --set fake_score.rate=1e39 --set fake_score.warmup=0";
    w.fails(line, 1, &["step 1: the checkpoint's fake_score: a value is NaN", "give lower rates"]);
    assert!(!w.path("run/checkpoints/step-00000001").exists() && !w.path("run/generator").exists());
}
