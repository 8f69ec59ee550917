//! From pictures to an exported file, through the program that a user holds.

mod common;
use common::{Workplace, max_difference};
use ndarray::Array4;
use serde_json::json;

/// The picture of a seed is the same in the generator's folder and in the file (in [-1, 1]).
const TOLERANCE: f32 = 1e-3;

#[test]
fn pictures_become_a_teacher_a_generator_and_a_file_that_agree() {
    let w = Workplace::new().with_pictures();
    let taught =
        w.ok("teacher train --data pictures --out teacher --size 8 --unet unet.json --steps 6 --batch 4 --device cpu");
    assert!(taught["loss"].as_f64().unwrap().is_finite() && taught["parameters"].as_u64().unwrap() > 5_000, "{taught}");
    w.write("distill.toml", "ratio = 2\nlog_every = 1\n[generator]\nwarmup = 1\n");
    let distilled =
        w.ok("distill --teacher teacher --out run --config distill.toml --steps 4 --batch 4 --device cpu --seed 3");
    for number in ["loss_dm", "loss_fake", "sample_mean", "sample_std", "real_error", "score_gap"] {
        assert!(distilled[number].as_f64().unwrap().is_finite(), "{number} in {distilled}");
    }
    assert_eq!(w.text("run/metrics.jsonl").lines().count(), 4);
    for grid in
        ["run/samples/step-00000000.png", "run/samples/step-00000004.png", "teacher/training/samples/step-00000006.png"]
    {
        assert!(image::open(w.path(grid)).unwrap().width() >= 128, "{grid}");
    }

    let exported = w.ok("export run/generator --onnx generator.onnx");
    let engines = exported["engines"].as_array().unwrap();
    assert!(!engines.is_empty(), "{exported}");
    let [weights, peak] = ["weight_bytes", "peak_memory_bytes"].map(|bytes| exported[bytes].as_u64());
    assert!(weights.is_some() && (peak > weights || cfg!(not(target_os = "linux"))), "{exported}");
    w.ok("export run/generator --onnx bytes.onnx --output u8 --batch 2");
    assert!(!w.path("generator.onnx.partial").exists());

    samples_agree(&w);
    noise_goes_round(&w);
    everything_can_be_inspected(&w);
    accelerators_take_what_was_exported(&w);
    let timed = w.ok("bench run generator.onnx --runs 3");
    for number in ["load_ms", "first_ms", "min_ms", "median_ms", "p90_ms", "p99_ms", "max_ms", "engine_ms"] {
        assert!(timed["rows"][0][number].as_f64().unwrap() > 0.0, "{timed}");
    }
    // Without the --threads of the other commands.
    let line = "--json bench run generator.onnx --runs 3 --thread-counts 1,2 --accelerator cpu --accelerator nnapi --plot a.svg";
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dmd"));
    let timed = command.current_dir(w.path("")).args(line.split_whitespace()).output().unwrap();
    assert!(timed.status.success(), "{}", common::stderr(&timed));
    let timed: serde_json::Value = serde_json::from_slice(&timed.stdout).unwrap();
    let rows = timed["rows"].as_array().unwrap();
    let told = |key: &str| rows.iter().map(|row| row[key].clone()).collect::<Vec<_>>();
    assert_eq!(told("threads"), [1, 2, 1, 2].map(|n| json!(n)), "{timed}");
    assert_eq!(told("asked"), ["CPU", "CPU", "NNAPI", "NNAPI"].map(|name| json!(name)), "{timed}");
    for row in &rows[2..] {
        assert!(row["passed_over"].as_str().is_some_and(|why| !why.is_empty()) && row["median_ms"].is_null(), "{row}");
    }
    assert_eq!(rows[0]["times_ms"].as_array().unwrap().len(), 3);
    assert!(std::fs::read_to_string(w.path("a.svg")).unwrap().contains("2 threads"));
    let timed = w.run("--json bench train --unet unet.json --batch 2 --steps 1 --ratio 1 --device cpu");
    assert!(timed.status.success(), "{}", common::stderr(&timed));
    let stdout = String::from_utf8(timed.stdout).unwrap();
    for key in ["one_step_sample", "generator_update", "critic_update", "iteration_ratio_1", "images_per_s"] {
        assert!(stdout.contains(key), "{stdout}");
    }
}

/// A teacher that also knows pictures without a class is guided in sampling, pairs and distillation, and its generator
/// is exported like any other; a score tells it from its data.
#[test]
fn a_guided_teacher_goes_the_whole_way() {
    let w = Workplace::new().with_pictures();
    w.ok(
        "teacher train --data pictures --out teacher --size 8 --unet unet.json --steps 6 --batch 4 --label-dropout 0.5",
    );
    assert_eq!(w.ok("inspect teacher")["classes"], json!(["blue", "red"]));
    for scale in ["1", "3"] {
        w.ok(&format!("sample teacher --npy {scale}.npy -n 4 --steps 2 --guidance {scale}"));
    }
    assert!(max_difference(&w.npy("1.npy"), &w.npy("3.npy")) > 1e-6);
    w.ok("pairs teacher --out pairs -n 8 --steps 2 --guidance 2");
    w.ok(
        "distill --teacher teacher --out run --recipe dmd --pairs pairs --guidance 2 --steps 2 --batch 2 --set ratio=1",
    );
    w.ok("export run/generator --onnx generator.onnx");
    w.ok("sample run/generator --npy a.npy -n 4");
    w.ok("sample generator.onnx --npy b.npy -n 4");
    assert!(max_difference(&w.npy("a.npy"), &w.npy("b.npy")) < TOLERANCE);

    let scored = w.ok("score generator.onnx --against pictures --against run/generator -n 32 --features teacher");
    let [data, itself] = &scored["scores"].as_array().unwrap()[..] else { panic!("{scored}") };
    assert_eq!((&data["pictures"], &itself["pictures"]), (&json!(24), &json!(32)));
    let number = |score: &serde_json::Value, name: &str| score[name].as_f64().unwrap();
    assert!(number(data, "sliced_wasserstein") > 2.0 * number(itself, "sliced_wasserstein"), "{scored}");
    assert!(number(data, "kernel_distance") > number(itself, "kernel_distance"), "{scored}");
    w.fails("score teacher --against nowhere", 1, &["nowhere"]);
    w.fails("score teacher", 2, &["--against"]);
}

/// A generator of three passes: the same seed makes the same pictures in its folder and in its file, whose graph is one
/// pass.
#[test]
fn a_generator_of_several_passes_goes_the_whole_way() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let steps = [10.0, 2.5, 0.5];
    w.ok("distill --teacher teacher --out run --steps 2 --batch 2 --set ratio=1 --set generator.steps=[10.0,2.5,0.5]");
    assert_eq!(w.ok("inspect run/generator")["steps"], json!(steps));
    w.refuses("export run/generator --onnx u8.onnx --output u8", 1, &["output u8 with 3 passes", "export f32"]);
    let exported = w.ok("export run/generator --onnx generator.onnx --report");
    assert!(exported["measured"]["psnr_db"].as_f64().unwrap() > 100.0, "{exported}");
    let file = w.ok("inspect generator.onnx");
    assert_eq!((&file["sigmas"], &file["format"]), (&json!(steps), &json!(3)));

    w.ok("sample run/generator --npy candle.npy -n 5 --seed 7 --batch 2 --steps 3");
    for (file, options) in [("onnx", ""), ("tract", "--engine tract")] {
        w.ok(&format!("sample generator.onnx --npy {file}.npy -n 5 --seed 7 {options}"));
        let difference = max_difference(&w.npy(&format!("{file}.npy")), &w.npy("candle.npy"));
        assert!(difference <= TOLERANCE, "{file}: {difference}");
    }
    // A given noise is that of the first pass; what is added after it is that of seed 0, in both.
    dmd::npy::write(&w.path("noise.npy"), &dmd_runtime::picture_noise(7, 0, 5, [3, 8, 8])).unwrap();
    w.ok("sample generator.onnx --noise noise.npy --npy file.npy");
    w.ok("sample run/generator --noise noise.npy --npy folder.npy");
    assert!(max_difference(&w.npy("file.npy"), &w.npy("folder.npy")) <= TOLERANCE);
    assert!(max_difference(&w.npy("file.npy"), &w.npy("onnx.npy")) > 1e-3);
    for model in ["run/generator", "generator.onnx"] {
        w.fails(&format!("sample {model} --steps 1 --npy no.npy"), 2, &["--steps 1", "in 3 passes"]);
    }

    for target in ["qnn", "directml", "webgpu", "tensorrt", "cpu"] {
        let report = w.ok(&format!("lint generator.onnx --target {target}"));
        assert_eq!((&report["partitions"], &report["refused"]), (&json!([report["nodes"]]), &json!([])), "{report}");
    }
    // The lookups come first, so that what CoreML takes is one piece after them.
    let coreml = w.ok("lint generator.onnx --target coreml");
    let refused: Vec<_> = coreml["refused"].as_array().unwrap().iter().map(|r| &r["operator"]).collect();
    assert!(refused.iter().all(|operator| *operator == "Gather") && refused.len() == 4, "{coreml}");
    assert_eq!(coreml["partitions"].as_array().unwrap().len(), 1, "{coreml}");
    assert!(w.ok("bench run generator.onnx --runs 2")["rows"][0]["median_ms"].as_f64().unwrap() > 0.0);
    w.ok("score generator.onnx --against run/generator -n 8");
}

fn samples_agree(w: &Workplace) {
    let of_teacher = w.ok("sample teacher --out teacher.png --npy teacher.npy -n 5 --steps 3 --seed 7");
    assert_eq!((&of_teacher["pictures"], &of_teacher["labels"]), (&json!(5), &json!([0, 1, 0, 1, 0])));
    assert_eq!(w.npy("teacher.npy").dim(), (5, 3, 8, 8));
    image::open(w.path("teacher.png")).unwrap();
    w.ok("sample teacher --npy euler.npy -n 5 --steps 3 --seed 7 --sampler euler");
    assert!(max_difference(&w.npy("teacher.npy"), &w.npy("euler.npy")) > 0.0);

    w.ok("sample run/generator --npy generator.npy -n 5 --seed 7 --batch 2");
    let generator = w.npy("generator.npy");
    for (file, options) in [("onnx", ""), ("tract", "--engine tract")] {
        w.ok(&format!("sample generator.onnx --out {file}.png --npy {file}.npy -n 5 --seed 7 {options}"));
        let difference = max_difference(&w.npy(&format!("{file}.npy")), &generator);
        assert!(difference <= TOLERANCE, "{file}: {difference}");
    }
    // Bytes are half a step off at most, a step where the floats fall on either side of a half.
    w.ok("sample bytes.onnx --npy bytes.npy -n 5 --seed 7");
    let clipped = generator.mapv(|v| v.clamp(-1.0, 1.0));
    assert!(max_difference(&w.npy("bytes.npy"), &clipped) <= 1.01 / 127.5);

    // One class only, by name and by number, and it is another picture than the other class's.
    w.ok("sample run/generator --npy red.npy -n 2 --seed 7 --class red");
    w.ok("sample run/generator --npy one.npy -n 2 --seed 7 --class 1");
    w.ok("sample run/generator --npy blue.npy -n 2 --seed 7 --class blue");
    assert_eq!(w.npy("red.npy"), w.npy("one.npy"));
    assert!(max_difference(&w.npy("red.npy"), &w.npy("blue.npy")) > 0.0);
}

/// The noise of a seed, given as a file, makes the seed's pictures; and a part of it makes the first of them.
fn noise_goes_round(w: &Workplace) {
    let noise: Array4<f32> = dmd_runtime::picture_noise(7, 0, 5, [3, 8, 8]);
    dmd::npy::write(&w.path("noise.npy"), &noise).unwrap();
    for (model, as_of_seed) in [("run/generator", "generator.npy"), ("generator.onnx", "onnx.npy")] {
        w.ok(&format!("sample {model} --noise noise.npy --npy again.npy --force"));
        assert!(max_difference(&w.npy("again.npy"), &w.npy(as_of_seed)) <= 1e-5, "{model}");
    }
    let part = w.ok("sample run/generator --noise noise.npy -n 2 --npy part.npy");
    assert_eq!(part["pictures"], 2);
    assert_eq!(w.npy("part.npy").dim().0, 2);
}

/// All nodes in one piece; for CoreML and XNNPACK see what they do not have.
fn accelerators_take_what_was_exported(w: &Workplace) {
    for target in ["qnn", "directml", "webgpu", "tensorrt", "cpu"] {
        let report = w.ok(&format!("lint generator.onnx --target {target}"));
        assert_eq!(report["partitions"], json!([report["nodes"]]), "{report}");
        assert_eq!(report["refused"], json!([]));
    }
    let coreml = w.ok("lint generator.onnx --target coreml");
    let refused: Vec<_> = coreml["refused"].as_array().unwrap().iter().map(|r| &r["operator"]).collect();
    assert_eq!((refused, coreml["partitions"].as_array().unwrap().len()), (vec![&json!("Gather")], 1), "{coreml}");
    for target in ["nnapi", "coreml"] {
        let line = format!("export run/generator --onnx {target}.onnx --target {target} --fixed-label red");
        let lint = &w.ok(&line)["lint"];
        assert!(lint["target"] == target && lint["refused"] == json!([]), "{lint}");
        assert_eq!(lint["partitions"], json!([lint["nodes"]]), "{lint}");
        assert_eq!(w.ok(&format!("inspect {target}.onnx"))["dialect"], lint["dialect"]);
    }
}

fn everything_can_be_inspected(w: &Workplace) {
    let teacher = w.ok("inspect teacher");
    assert_eq!((&teacher["kind"], &teacher["classes"]), (&json!("teacher"), &json!(["blue", "red"])));
    let generator = w.ok("inspect run/generator");
    assert_eq!((&generator["kind"], &generator["sigma"]), (&json!("generator"), &json!(2.5)));
    assert_eq!(generator["run"]["seed"], 3);
    let run = w.ok("inspect run");
    assert_eq!((&run["config"]["batch"], &run["last_metrics"]["step"]), (&json!(4), &json!(4)));
    let file = w.ok("inspect generator.onnx");
    assert_eq!((&file["classes"], &file["width"]), (&json!(["blue", "red"]), &json!(8)));
    assert_eq!(w.ok("inspect bytes.onnx")["batch"], 2);
    let tensors = w.ok("inspect run/generator/unet/diffusion_pytorch_model.safetensors");
    assert_eq!(tensors["parameters"], teacher["parameters"]);
    // What was asked for is on stdout, for whoever pipes it.
    let output = w.run("inspect teacher");
    assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty());
}

#[test]
fn grey_pictures_without_classes_go_the_same_way() {
    let w = Workplace::new().with_pictures();
    w.edit_json("unet.json", |unet| (unet["in_channels"], unet["out_channels"]) = (json!(1), json!(1)));
    w.ok("teacher train --data pictures --out teacher --size 8x12 --grey --unconditional --flip --unet unet.json --steps 2 --batch 2");
    w.ok("distill --teacher teacher --out run --steps 1 --batch 2");
    w.ok("export run/generator --onnx generator.onnx");
    w.ok("sample run/generator --npy generator.npy -n 3");
    w.ok("sample generator.onnx --npy file.npy -n 3");
    assert_eq!(w.npy("file.npy").dim(), (3, 1, 8, 12));
    assert!(max_difference(&w.npy("generator.npy"), &w.npy("file.npy")) <= TOLERANCE);
}

#[test]
fn a_report_shows_what_a_precision_costs() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let export = "export teacher --as-generator --sigma 2.5 --report --force --onnx a.onnx --precision";
    let mut psnr = Vec::new();
    for precision in ["fp32", "fp16 --min-psnr 20", "w8 --min-psnr 20", "w8a8 --min-psnr 20"] {
        let report = w.ok(&format!("{export} {precision}"));
        let precision = precision.split(' ').next().unwrap();
        assert_eq!(report["export"]["precision"], precision);
        assert_eq!(report["measured"]["pictures"], 256);
        psnr.push(report["measured"]["psnr_db"].as_f64().unwrap());
        let written: serde_json::Value = serde_json::from_str(&w.text("a.onnx.report.json")).unwrap();
        assert_eq!(written, report);
        let page = w.text("a.onnx.report.html");
        assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 3);
        assert!(!page.contains("http") && page.contains("difference ×10"));
        assert_eq!(w.ok("inspect a.onnx")["precision"], precision);
    }
    assert!(psnr.is_sorted_by(|a, b| a > b), "{psnr:?}");
}

/// Bytes are compared with what the network's pictures become in bytes, not with what lies beyond their range.
#[test]
fn a_report_of_bytes_compares_bytes() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let export = "export teacher --as-generator --sigma 2.5 --report --force --onnx a.onnx";
    let measured = w.ok(&format!("{export} --output u8"))["measured"].clone();
    // A step is 2/255, and one byte of 49,152 that is off by it makes 89 dB; where none is, the PSNR is no number.
    assert!(measured["max_difference"].as_f64().unwrap() < 0.0079, "{measured}");
    assert!(measured["psnr_db"].as_f64().is_none_or(|psnr| psnr > 60.0), "{measured}");
    let raw = w.ok(export)["measured"].clone();
    assert!(raw["psnr_db"].as_f64().unwrap() > 100.0, "{raw}");
}

/// What is timed is one pass, of as many pictures as the report says.
#[test]
fn a_report_says_how_many_pictures_its_latency_is_of() {
    let w = Workplace::new().with_fixture("edm-tiny");
    for (option, pictures, text) in
        [("", 1, "1 picture<"), ("--batch 3", 3, "3 pictures<"), ("--dynamic-batch", 1, "1 picture<")]
    {
        let report =
            w.ok(&format!("export teacher --as-generator --sigma 2.5 --report --force --onnx a.onnx {option}"));
        assert_eq!(report["measured"]["latency_batch"], pictures, "{report}");
        assert!(report["measured"]["latency_ms"].as_f64().unwrap() > 0.0, "{report}");
        assert!(w.text("a.onnx.report.html").contains(&format!(" ms a pass of {text}")), "{option}");
    }
}

/// A target that takes a part of the file is a warning of one line, one that takes all of it is none.
#[test]
fn a_target_that_takes_a_part_of_the_file_is_warned_of() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let stderr = |target: &str| {
        let line = format!("export teacher --as-generator --sigma 2.5 --onnx {target}.onnx --target {target}");
        let output = w.run(&line);
        assert!(output.status.success(), "{}", common::stderr(&output));
        common::stderr(&output)
    };
    let xnnpack = stderr("xnnpack");
    let warning = xnnpack.lines().find(|line| line.starts_with("warning: xnnpack takes ")).unwrap();
    assert!(warning.contains("nodes of xnnpack.onnx; `dmd lint xnnpack.onnx --target xnnpack` tells why"), "{warning}");
    assert!(!stderr("cpu").contains("warning: cpu takes"));
}
