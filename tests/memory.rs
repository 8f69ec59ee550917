//! A teacher trained in less memory learns the same, and a batch that cannot fit is refused before anything is trained.

mod common;
use common::{Workplace, stderr, without_times_in};
use serde_json::Value;

const TEACH: &str = "teacher train --data pictures --config teacher.toml --device cpu --out";

fn workplace(settings: &str) -> Workplace {
    let w = Workplace::new().with_pictures();
    w.write(
        "teacher.toml",
        format!("steps = 8\nbatch = 4\nsize = [8, 8]\nunet = \"unet.json\"\nlog_every = 1\nheld_out = 0.2\n{settings}"),
    );
    w
}

/// Numbers of this name, one a step.
fn logged(w: &Workplace, teacher: &str, name: &str) -> Vec<f64> {
    let metrics = w.text(&format!("{teacher}/training/metrics.jsonl"));
    let number = |line| serde_json::from_str::<Value>(line).unwrap()[name].as_f64();
    metrics.lines().filter_map(number).collect()
}

/// Losses and gradients of two runs are the same but for rounding.
fn assert_close(w: &Workplace, one: &str, other: &str) {
    for (name, n) in [("loss", 8), ("grad_norm", 8), ("validation_loss", 1)] {
        let (a, b) = (logged(w, one, name), logged(w, other, name));
        assert!(a.len() == b.len() && a.len() >= n, "{name}: {} and {}", a.len(), b.len());
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= 1e-4 * a.abs(), "{name}: {a} and {b}");
        }
    }
}

#[test]
fn a_teacher_learns_the_same_in_parts() {
    let w = workplace("flip = true\nlabel_dropout = 0.3\n");
    w.ok(&format!("{TEACH} whole"));
    w.ok(&format!("{TEACH} parts --accumulate 2"));
    assert_close(&w, "whole", "parts");
    w.refuses(&format!("{TEACH} thirds --accumulate 3"), 2, &["accumulate is 3, expected a divisor of batch (4)"]);
    w.refuses(&format!("{TEACH} none --accumulate 0"), 2, &["accumulate is 0, expected at least 1"]);
}

#[test]
fn a_teacher_learns_the_same_from_recomputed_blocks() {
    let w = workplace("");
    w.ok(&format!("{TEACH} kept"));
    w.ok(&format!("{TEACH} again --grad-checkpoint"));
    assert_close(&w, "kept", "again");
    assert_eq!(logged(&w, "kept", "loss")[0], logged(&w, "again", "loss")[0]);
}

/// A run of a version that knew neither setting goes on with both off, and with another value where it is told one.
#[test]
fn an_older_run_of_a_teacher_goes_on() {
    let w = workplace("checkpoint_every = 4\n");
    let whole = w.ok(&format!("{TEACH} whole"));
    w.copy("whole", "older");
    std::fs::remove_dir_all(w.path("older/training/checkpoints/step-00000008")).unwrap();
    let settings = w.text("older/training/config.toml");
    let known = |line: &&str| !line.starts_with("accumulate") && !line.starts_with("grad_checkpoint");
    let older: String = settings.lines().filter(known).flat_map(|line| [line, "\n"]).collect();
    assert_eq!(older.lines().count() + 2, settings.lines().count());
    w.write("older/training/config.toml", older);
    w.copy("older", "parts");
    let on = w.ok(&format!("{TEACH} older"));
    assert_eq!(on["loss"], whole["loss"]);
    let left = |folder: &str| {
        let mut files = w.snapshot(folder);
        without_times_in(&mut files);
        files
    };
    for part in ["unet", "training/checkpoints/step-00000008"] {
        assert!(left(&format!("older/{part}")) == left(&format!("whole/{part}")), "{part}");
    }
    let said = stderr(&w.run(&format!("{TEACH} parts --accumulate 2 --grad-checkpoint")));
    for difference in ["accumulate is 2, was 1", "grad_checkpoint is true, was false"] {
        assert!(said.contains(difference), "{said}");
    }
    assert_close(&w, "whole", "parts");
}

#[test]
fn a_run_in_parts_with_recomputed_blocks_goes_on_where_it_stopped() {
    let w = workplace("checkpoint_every = 4\naccumulate = 2\ngrad_checkpoint = true\n");
    w.ok(&format!("{TEACH} whole"));
    w.copy("whole", "pieces");
    std::fs::remove_dir_all(w.path("pieces/training/checkpoints/step-00000008")).unwrap();
    let output = w.run(&format!("{TEACH} pieces"));
    assert!(stderr(&output).contains("continuing from step 4"), "{}", stderr(&output));
    assert!(w.snapshot("pieces/unet") == w.snapshot("whole/unet"));
}

#[test]
fn training_says_where_it_runs_and_what_it_took() {
    let w = workplace("").with_fixture("edm-tiny");
    let distill = "distill --teacher teacher --steps 1 --batch 1 --device cpu --out";
    for (line, out) in [(TEACH, "new"), (distill, "run")] {
        let output = w.run(&format!("--json {line} {out}"));
        let text = stderr(&output);
        let at = |words: &str| text.find(words).unwrap_or_else(|| panic!("{text:?} lacks {words:?}"));
        assert!(at("training on cpu") < at("peak memory "), "{text}");
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(result["peak_memory_bytes"].is_u64(), cfg!(target_os = "linux"), "{result}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_batch_that_cannot_fit_is_refused_before_anything_is_trained() {
    let w = workplace("").with_fixture("edm-tiny");
    for line in [
        &format!("{TEACH} new"),
        &format!("{TEACH} new --grad-checkpoint"),
        "distill --teacher teacher --out run --recipe plain",
        "distill --teacher teacher --out run --grad-checkpoint",
        "bench train --unet unet.json",
    ] {
        let parts = ["100000000 samples at a time take about ", " MiB, and ", " MiB are free: lower --batch"];
        w.refuses(&format!("{line} --batch 100000000"), 1, &parts);
    }
    // What is told is what runs at a time.
    w.refuses(
        &format!("{TEACH} new --batch 100000000 --accumulate 2"),
        1,
        &["50000000 samples at a time take about ", "raise a run's accumulate"],
    );
}
