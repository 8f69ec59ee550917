//! `--threads`: how many there are, and that as many give the same bytes.

mod common;
use common::{Workplace, stderr, without_times_in};
use std::process::{Command, Output, Stdio};

/// `dmd` with the words of this line, on so many threads.
fn command(w: &Workplace, threads: usize, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmd"));
    command.current_dir(w.path("")).args(["--threads", &threads.to_string()]).args(line.split_whitespace());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn check_success(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

#[test]
fn a_distillation_on_two_threads_gives_the_same_weights_twice() {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.write("distill.toml", "steps = 12\nratio = 2\nlog_every = 1\nsample_every = 50\ncheckpoint_every = 12\n");
    // A batch that two threads do not divide, and one that they do.
    for batch in [3, 4] {
        let run = |out: &str| {
            let line =
                format!("distill --teacher teacher --config distill.toml --batch {batch} --device cpu --out {out}");
            check_success(&command(&w, 2, &line).output().unwrap());
            let mut left =
                [format!("{out}/generator/unet"), format!("{out}/checkpoints")].map(|part| w.snapshot(&part));
            left.iter_mut().for_each(without_times_in);
            left
        };
        let first = run(&format!("first-{batch}"));
        assert!(first.iter().all(|files| files.len() > 1));
        for again in ["second", "third"] {
            assert!(run(&format!("{again}-{batch}")) == first, "batch {batch}: the {again} run differs");
        }
    }
}

/// The names of a process's threads; candle gives its own one.
#[cfg(target_os = "linux")]
fn thread_names(process: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    // A thread may end while it is looked at.
    tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok()).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn as_many_threads_work_as_were_asked_for() {
    let w = Workplace::new();
    // Large enough that candle's threads join in.
    w.write("unet.json", include_str!("../benches/peers/unet-16.json"));
    for threads in 1..4 {
        // What rayon and candle would go by otherwise does not matter.
        let mut command = command(&w, threads, "bench train --unet unet.json --steps 1 --batch 8 --device cpu");
        let mut child = command.env("RAYON_NUM_THREADS", "7").env("CANDLE_NUM_THREADS", "8").spawn().unwrap();
        // Each pool has the main thread for one of its own.
        let expected = [2 * threads - 1, threads - 1];
        let mut most = [0, 0];
        while child.try_wait().unwrap().is_none() {
            let names = thread_names(child.id());
            let candles = names.iter().filter(|name| name.starts_with("candle")).count();
            most = [most[0].max(names.len()), most[1].max(candles)];
            assert!(most[0] <= expected[0], "{threads} threads: {names:?}");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        check_success(&child.wait_with_output().unwrap());
        assert_eq!(most, expected);
    }
}
