//! Bad input ends in a clear message and an exit code, and leaves everything as it was.
#![allow(clippy::print_stderr)] // why a test is skipped

mod common;
use common::{Workplace, check_failure};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::collections::BTreeMap;

const TEACH: &str = "teacher train --out teacher --size 8 --unet unet.json --steps 1 --batch 2 --data";
const DISTILL: &str = "distill --teacher teacher --out run --steps 1 --batch 2";
const WEIGHTS: &str = "teacher/unet/diffusion_pytorch_model.safetensors";

/// A generator in `run/generator`, without training.
fn generator() -> Workplace {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.copy("teacher", "run/generator");
    w.write(
        "run/generator/dmd.json",
        r#"{"kind": "generator", "sigma": 2.5, "version": "0.1.0", "classes": ["a", "b", "c"]}"#,
    );
    w
}

#[test]
fn a_data_folder_without_pictures_is_refused() {
    let w = Workplace::new().with_pictures();
    w.refuses(&format!("{TEACH} nowhere"), 1, &["nowhere: cannot read"]);
    std::fs::create_dir(w.path("empty")).unwrap();
    w.refuses(&format!("{TEACH} empty"), 1, &["empty: no pictures; expected png, apng, jpg", "found nothing"]);
    w.write("texts/a.txt", "no picture");
    w.refuses(&format!("{TEACH} texts"), 1, &["texts: no pictures", "found only other files: 1 .txt"]);
    w.write("data.zip", "this is no zip");
    w.refuses(
        &format!("{TEACH} data.zip"),
        1,
        &["data.zip: expected a folder or a zip of pictures, found a file that is no zip"],
    );
}

#[test]
fn a_corrupt_picture_is_named_and_skipped_or_refused() {
    let w = Workplace::new().with_pictures();
    let mut bytes = std::fs::read(w.path("pictures/red/12.png")).unwrap();
    bytes.truncate(60);
    w.write("pictures/red/broken.png", bytes);
    w.refuses(
        &format!("{TEACH} pictures --strict"),
        1,
        &["1 of 25 pictures cannot be read; the first is red/broken.png: "],
    );
    let output = w.run(&format!("{TEACH} pictures"));
    let message = common::stderr(&output);
    assert!(output.status.success(), "{message}");
    for part in [
        "24 pictures, 8x8, 3 channels, 2 classes (blue, red)",
        "skipped red/broken.png: ",
        "1 of 25 pictures are left out",
    ] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn broken_weights_are_named() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let whole = std::fs::read(w.path(WEIGHTS)).unwrap();
    w.write(WEIGHTS, "");
    w.refuses(DISTILL, 1, &["the teacher: ", WEIGHTS, "not a safetensors file, but an empty file"]);
    for n_bytes in [5, 4000, whole.len() - 1] {
        w.write(WEIGHTS, &whole[..n_bytes]);
        let size = format!("not a whole safetensors file ({n_bytes} bytes)");
        w.refuses(DISTILL, 1, &["the teacher: ", WEIGHTS, &size]);
    }
    // A header that promises more memory than there is costs nothing.
    w.write(WEIGHTS, [&u64::MAX.to_le_bytes()[..], b"{}"].concat());
    w.refuses(DISTILL, 1, &["not a whole safetensors file"]);
    w.refuses(&format!("inspect {WEIGHTS}"), 1, &["not a whole safetensors file"]);

    let replace = |shape: &[usize], name: &str| {
        let parsed = SafeTensors::deserialize(&whole).unwrap();
        let mut tensors: BTreeMap<String, TensorView> = parsed.tensors().into_iter().collect();
        let bytes = vec![0u8; 4 * shape.iter().product::<usize>()];
        tensors.remove("conv_in.weight");
        tensors.insert(name.into(), TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &bytes).unwrap());
        w.write(WEIGHTS, safetensors::serialize(tensors, None).unwrap());
    };
    replace(&[8, 4, 3, 3], "conv_in.weight");
    w.refuses(DISTILL, 1, &[WEIGHTS, "\"conv_in.weight\"", "[8, 4, 3, 3]", "[8, 3, 3, 3]"]);
    replace(&[8, 3, 3, 3], "conv_inn.weight");
    w.refuses(DISTILL, 1, &["missing", "\"conv_in.weight\"", "\"conv_inn.weight\""]);
    std::fs::remove_file(w.path(WEIGHTS)).unwrap();
    w.refuses(DISTILL, 1, &["has no diffusion_pytorch_model.safetensors"]);
}

/// The run stops at the step and the loss that are not finite, before a weight is touched.
#[test]
fn weights_that_are_not_numbers_stop_the_run() {
    // Half floats: not a number, infinity.
    for value in [0x7e00_u16, 0x7c00] {
        let w = Workplace::new().with_fixture("edm-tiny");
        let mut bytes = std::fs::read(w.path(WEIGHTS)).unwrap();
        let last = bytes.len() - 2;
        bytes[last..].copy_from_slice(&value.to_le_bytes());
        w.write(WEIGHTS, bytes);
        w.fails(DISTILL, 1, &["step 1: loss_", "the run stops here"]);
        assert!(w.snapshot("run/checkpoints").is_empty() && !w.path("run/generator").exists());
    }
}

/// A rate far too high ends the run, and what is left on the disk is finite and can be taken up again.
#[test]
fn a_diverging_run_stops_and_keeps_a_good_checkpoint() {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.write("wild.toml", "ratio = 1\ncheckpoint_every = 1\n[generator]\nrate = 1e6\nwarmup = 20\n[fake_score]\nrate = 1e6\nwarmup = 20\n");
    let message = w.fails(
        "distill --teacher teacher --out run --steps 100 --batch 2 --config wild.toml",
        1,
        &["step ", "loss_", "the run stops here"],
    );
    assert!(!message.contains("step 1: "), "{message}");
    let mut n_checked = 0;
    for path in w.snapshot("run/checkpoints").keys().filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
    {
        let weights =
            dmd_models::Weights::load(&w.path("run/checkpoints").join(path), &candle_core::Device::Cpu).unwrap();
        for (name, tensor) in weights.iter() {
            let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            assert!(values.iter().all(|v| v.is_finite()), "{}: {name}", path.display());
            n_checked += values.len();
        }
    }
    assert!(n_checked > 0, "no checkpoint was kept");
}

#[test]
fn wrong_settings_are_named_with_what_is_allowed() {
    let w = Workplace::new().with_fixture("edm-tiny").with_pictures();
    w.write("a.toml", "step = 3\n");
    w.refuses(&format!("{DISTILL} --config a.toml"), 2, &["a.toml: unknown key \"step\", did you mean \"steps\"?"]);
    w.write("a.toml", "[generator]\nsigmma = 3\n");
    w.refuses(&format!("{DISTILL} --config a.toml"), 2, &["did you mean \"generator.sigma\"?"]);
    w.write("a.toml", "batch = many\n");
    w.refuses(&format!("{DISTILL} --config a.toml"), 2, &["a.toml: not TOML"]);
    w.write("a.toml", "[generator]\nsigma = 500.0\n");
    w.refuses(
        &format!("{DISTILL} --config a.toml"),
        1,
        &["generator.sigma is 500, expected within the teacher's noise levels, 0.002 to 80"],
    );
    w.refuses(&format!("{DISTILL} --config none.toml"), 1, &["none.toml: "]);
    w.write("a.toml", "[optimiser]\n");
    w.refuses(
        &format!("{TEACH} pictures --config a.toml").replace("--out teacher", "--out new"),
        2,
        &["unknown key \"optimiser\", did you mean \"optimizer\"?"],
    );

    w.refuses("distill --teacher teacher --out run --batch 0", 2, &["batch is 0, expected at least 1"]);
    w.refuses("teacher train --data pictures --out new --batch 0", 2, &["batch is 0, expected at least 1"]);
    w.refuses("sample teacher --npy a.npy --batch 0", 2, &["--batch is 0, expected 1 to"]);
    w.refuses("distill --teacher teacher --out run --steps 0", 2, &["steps is 0, expected at least 1"]);

    w.edit_json("unet.json", |unet| unet["block_out_chanels"] = json!([8]));
    w.refuses(
        "bench train --unet unet.json",
        1,
        &["unet.json: unknown key \"block_out_chanels\", did you mean \"block_out_channels\"?"],
    );
}

#[test]
fn a_size_that_the_network_cannot_halve_is_refused() {
    let w = Workplace::new().with_fixture("edm-tiny").with_pictures();
    let line = "teacher train --data pictures --out new --unet unet.json --steps 1 --size 9";
    w.refuses(line, 1, &["9x9 cannot be halved 1 times", "multiples of 2"]);
    w.edit_json("teacher/unet/config.json", |unet| unet["sample_size"] = json!([8, 7]));
    w.refuses(DISTILL, 1, &["unet/config.json: ", "8x7 cannot be halved"]);
}

#[test]
fn a_class_that_does_not_exist_is_refused_with_those_that_do() {
    let w = generator();
    w.refuses(
        "sample run/generator --npy a.npy --class fox",
        1,
        &["--class fox: no such class, the model has a, b, c (0 to 2)"],
    );
    w.refuses("sample run/generator --npy a.npy --class 3", 1, &["--class 3: no such class"]);
    w.ok("export run/generator --onnx g.onnx");
    w.refuses("sample g.onnx --npy a.npy --class -1", 2, &["unexpected argument"]);
    w.refuses("sample g.onnx --npy a.npy --class fox", 1, &["--class fox: no such class"]);
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.refuses("sample teacher --npy a.npy --class fox", 1, &["--class fox: the model has no classes"]);
}

#[test]
fn nothing_is_overwritten_unless_forced() {
    let w = generator().with_pictures();
    for file in ["a.png", "a.npy", "a.onnx", "out/note.txt"] {
        w.write(file, "mine");
    }
    w.refuses("sample run/generator --out a.png", 1, &["a.png: exists already, and is only replaced with --force"]);
    w.refuses("sample run/generator --out b.png --npy a.npy", 1, &["a.npy: exists already"]);
    w.refuses("export run/generator --onnx a.onnx", 1, &["a.onnx: exists already, and is only replaced with --force"]);
    w.refuses("distill --teacher teacher --out out", 1, &["out: exists and is not a run of this kind", "--force"]);
    w.refuses("distill --teacher teacher --out a.png", 1, &["a.png: exists and is not a run"]);
    for out in ["teacher", "out", "a.png"] {
        w.refuses(
            &format!("teacher train --data pictures --unet unet.json --size 8 --steps 1 --out {out}"),
            1,
            &["exists and is not", "--force"],
        );
    }
    w.ok("sample run/generator --out a.png -n 1 --force");
    w.ok("export run/generator --onnx a.onnx --force");
    w.ok("distill --teacher teacher --out out --steps 1 --batch 1 --force");
    assert_eq!(w.text("out/note.txt"), "mine");
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    let w = generator().with_pictures();
    w.write("file", "in the way");
    w.refuses("distill --teacher teacher --out file/run --steps 1", 1, &["file/run"]);
    w.refuses(&format!("{TEACH} pictures").replace("--out teacher", "--out file/teacher"), 1, &["file/teacher"]);
    w.refuses("export run/generator --onnx file/a.onnx", 1, &["file"]);
    w.refuses("sample run/generator --out file/a.png", 1, &["file"]);
    std::fs::create_dir(w.path("folder.onnx")).unwrap();
    w.refuses("export run/generator --onnx folder.onnx --force", 1, &["folder.onnx"]);
    w.refuses("sample run/generator --out folder.onnx --force", 2, &["folder.onnx: pictures are written as .png"]);
}

#[test]
fn the_wrong_kind_of_model_is_refused() {
    let w = generator();
    w.refuses("export teacher --onnx a.onnx", 1, &["teacher: is a teacher", "distil it first"]);
    w.refuses("distill --teacher run/generator --out new", 1, &["run/generator: is a generator, expected a teacher"]);
    w.refuses("distill --teacher nowhere --out new", 1, &["the teacher: nowhere: no such folder"]);
    w.refuses("sample nowhere --npy a.npy", 1, &["nowhere: no such folder"]);
    w.refuses(
        "sample run/generator --npy a.npy --steps 4",
        2,
        &["--steps 4: this generator makes a picture in one pass"],
    );
    w.refuses("inspect nowhere", 1, &["nowhere: no such file or folder"]);
    w.write("a.txt", "text");
    w.refuses("inspect a.txt", 1, &["a.txt: not a model folder, a run, an .onnx, .ort or .safetensors file"]);
}

#[test]
fn noise_that_does_not_fit_is_refused() {
    let w = generator();
    let noise =
        |shape: [usize; 3]| dmd::npy::write(&w.path("noise.npy"), &dmd_runtime::picture_noise(0, 0, 2, shape)).unwrap();
    noise([1, 8, 8]);
    w.refuses(
        "sample run/generator --npy a.npy --noise noise.npy",
        1,
        &["noise.npy: noise of shape [2, 1, 8, 8], expected [N, 3, 8, 8]"],
    );
    noise([3, 8, 8]);
    w.refuses(
        "sample run/generator --npy a.npy --noise noise.npy -n 3",
        1,
        &["noise.npy: holds 2 noises, -n asks for 3"],
    );
    w.write("noise.npy", "no array");
    w.refuses("sample run/generator --npy a.npy --noise noise.npy", 1, &["noise.npy: not the .npy file expected"]);
}

#[test]
fn a_file_that_is_not_one_of_ours_is_refused() {
    let w = generator();
    // An empty graph as another program would write it: ir_version 8, producer "pytorch", opset 17.
    w.write("theirs.onnx", b"\x08\x08\x12\x07pytorch\x3a\x00\x42\x02\x10\x11");
    w.write("text.onnx", "this is no model");
    w.ok("export run/generator --onnx ours.onnx");
    let ours = std::fs::read(w.path("ours.onnx")).unwrap();
    w.write("half.onnx", &ours[..ours.len() / 2]);
    w.write("text.ort", "this is no model");
    for command in ["sample FILE --npy a.npy", "inspect FILE", "bench run FILE"] {
        let check = |file: &str, part: &str| w.refuses(&command.replace("FILE", file), 1, &[file, part]);
        check("theirs.onnx", "not one of ours");
        check("text.onnx", "not a whole ONNX file");
        check("half.onnx", "not a whole ONNX file");
        check("text.ort", "expected the format of ONNX Runtime, .ort");
        check("missing.onnx", "");
    }
}

/// Asked for by name, ONNX Runtime must be there; left to choose, the program takes tract and says so once.
#[test]
fn what_cannot_be_linted_is_named() {
    let w = Workplace::new();
    w.write("page.onnx", "<!doctype html>");
    w.write("empty.onnx", "");
    w.refuses("lint page.onnx --target cpu", 1, &["page.onnx: not an ONNX file: "]);
    w.refuses("lint empty.onnx --target cpu", 1, &["empty.onnx: not an ONNX file: there is no graph in it"]);
    w.refuses("lint missing.onnx --target cpu", 1, &["missing.onnx: cannot read: "]);
    w.refuses("lint . --target cpu", 1, &[".: is a folder, expected an exported file"]);
    w.refuses("lint page.onnx --target core-ml", 2, &["no target \"core-ml\", did you mean \"coreml\"?", "nnapi, qnn"]);
    w.refuses("lint page.onnx", 2, &["--target <coreml|nnapi|"]);
    w.refuses(
        "export a --onnx b --target nnapi --dialect native",
        2,
        &["--target", "cannot be used with", "--dialect"],
    );
}

#[test]
fn what_cannot_be_written_for_a_minimal_build_is_named() {
    let w = generator();
    w.ok("export run/generator --onnx ours.onnx");
    w.write("theirs.onnx", b"\x08\x08\x12\x07pytorch\x3a\x00\x42\x02\x10\x11");
    w.write("there.ort", "");
    w.refuses("ort ours.onnx --out there.ort", 1, &["there.ort: exists already"]);
    w.refuses("ort ours.onnx --out new.ort --required-operators there.ort", 1, &["there.ort: exists already"]);
    w.refuses("ort ours.onnx --out ours.bin", 1, &["ours.bin: expected a name that ends in .ort"]);
    w.refuses("ort theirs.onnx --out new.ort", 1, &["theirs.onnx: not one of ours"]);
    w.refuses("ort missing.onnx --out new.ort", 1, &["missing.onnx: "]);
    w.refuses("ort ours.onnx", 2, &["--out <FILE.ort>"]);
}

#[test]
fn a_missing_onnx_runtime_is_an_error_or_one_warning() {
    let w = generator();
    w.ok("export run/generator --onnx g.onnx");
    w.write("library.so", "no library");
    let run = |engine: &str| {
        let mut command = w.command(&format!("sample g.onnx --npy {engine}.npy -n 1 --engine {engine}"));
        command.env_clear().env("ORT_DYLIB_PATH", w.path("library.so")).env("DMD_CACHE", w.path("cache"));
        command.output().unwrap()
    };
    let named = run("onnxruntime");
    if named.status.success() {
        return; // this machine has a library where the system or Python keeps it
    }
    check_failure(
        "sample",
        &named,
        1,
        &["no usable ONNX Runtime library; tried", "ORT_DYLIB_PATH", "library.so", "cache folder"],
    );
    assert!(!w.path("onnxruntime.npy").exists());
    let chosen = run("auto");
    let message = common::stderr(&chosen);
    assert!(chosen.status.success(), "{message}");
    assert_eq!(message.matches("warning: ").count(), 1, "{message}");
    assert!(message.contains("tract"), "{message}");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_in_a_cpu_build_is_refused() {
    let w = generator().with_pictures();
    for line in [
        DISTILL.to_string(),
        format!("{TEACH} pictures").replace("--out teacher", "--out new"),
        "sample teacher --npy a.npy".into(),
    ] {
        w.refuses(
            &format!("{line} --device cuda"),
            1,
            &["--device cuda: this dmd was built for the CPU", "--features cuda"],
        );
    }
    w.refuses("distill --teacher teacher --out run2 --device tpu", 2, &["expected auto, cpu, cuda or cuda:N"]);
}

#[test]
fn wrong_usage_has_exit_code_2() {
    let w = generator();
    for line in [
        "",
        "distil",
        "distill --teacher teacher",
        "sample run/generator",
        "sample run/generator --npy a.npy --seed x",
        "teacher train --data a --out b --size 8x",
    ] {
        w.refuses(line, 2, &[]);
    }
    w.refuses(
        "sample run/generator",
        2,
        &["nothing to write: give --out GRID.png, --pictures DIR, --npy FILE.npy, --latents FILE.npy or several of them"],
    );
}

/// A script finds the error where it looks for the result.
#[test]
fn an_error_is_an_object_too() {
    let w = Workplace::new();
    let output = w.run("--json inspect nowhere");
    assert_eq!(output.status.code(), Some(1));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value["error"].as_str().unwrap().contains("nowhere: no such file or folder"));
}

/// Everything that the terms of the loss need is asked for before anything is loaded, with the remedy.
#[test]
fn terms_without_what_they_need_are_refused() {
    let w = Workplace::new().with_fixture("edm-tiny").with_pictures();
    let refuses = |options: &str, code, parts: &[&str]| _ = w.refuses(&format!("{DISTILL} {options}"), code, parts);
    let check = |options: &str, parts: &[&str]| refuses(options, 2, parts);
    check("--recipe dmd2", &["loss.gan needs real pictures: give --data PATH"]);
    check("--recipe dmd", &["there are no pairs", "dmd pairs TEACHER"]);
    check(
        "--recipe plain --set loss.divergence=forward-kl",
        &["loss.divergence needs a discriminator", "loss.gan.critic_weight"],
    );
    check("--set loss.divergence=forward-kl", &["not the score-identity loss: give --recipe plain"]);
    check("--set loss.gan.weight=1", &["loss.gan.weight is 1 without a discriminator"]);
    check("--set generator.steps=[1.0,2.0]", &["generator.steps is [1.0, 2.0], expected descending noise levels"]);
    check(
        "--recipe dmd2 --data pictures --set loss.gan.start_step=1",
        &["loss.gan.start_step is 1, expected below steps (1)", "never join"],
    );
    check("--set accumulate=3", &["accumulate is 3, expected a divisor of batch (2)"]);
    check("--set loss.gna.weight=1", &["--set loss.gna.weight=1", "did you mean \"loss.gan\"?"]);
    check("--set batch", &["--set batch: expected KEY=VALUE"]);
    check("--set loss.divergence=kl", &["unknown variant `kl`", "forward-kl"]);
    // What the settings alone do not tell.
    let check = |options: &str, parts: &[&str]| refuses(options, 1, parts);
    check("--set generator.steps=[90.0,2.0]", &["generator.steps is 90, expected within the teacher's noise levels"]);
    check("--guidance 2", &["the teacher knows no pictures without a class", "--label-dropout"]);
    check("--start teacher/unet", &["generator.start", "not a diffusers folder"]);
    check("--recipe dmd --pairs nowhere", &["nowhere/pairs.json: no pairs (make them with `dmd pairs"]);
    check(
        "--recipe dmd2 --data pictures",
        &["class \"blue\" is none of the model's (0, 1, 2)", "dmd.json", "{\"classes\": [\"blue\", \"red\"]}"],
    );
    check("--recipe dmd2 --data nowhere", &["nowhere: cannot read"]);
    w.refuses(&format!("{DISTILL} --recipe best"), 2, &["dmd2", "f-js", "sid"]);
    w.refuses("pairs teacher --out p -n 0", 2, &["-n is 0, expected at least 1"]);
    w.refuses("pairs teacher --out p -n 9000000000", 2, &["-n is 9000000000, expected at most 1000000000"]);
    let line = "pairs teacher --out p -n 1000000000 --per-shard 1000000000";
    w.refuses(line, 1, &["1000000000 pairs at a time (--per-shard) take 1464843 MiB"]);
    w.refuses("pairs teacher --out p --guidance 2", 1, &["--label-dropout"]);
    w.refuses("pairs teacher --out pictures", 1, &["pictures: exists and holds no pairs"]);
    w.refuses("sample teacher --npy a.npy --guidance 2", 1, &["train it with --label-dropout", "null_class"]);
    w.refuses(
        &format!("{TEACH} pictures --unconditional --label-dropout 0.1"),
        2,
        &["--unconditional leaves no classes"],
    );
}

/// What small files tell of a teacher and of pairs is asked before the weights, which are none here.
#[test]
fn what_small_files_tell_is_refused_before_weights_are_read() {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.ok("pairs teacher --out pairs -n 2 --steps 1");
    w.write(WEIGHTS, "no weights");
    let paired = format!("{DISTILL} --recipe dmd --pairs pairs");
    w.refuses(&paired, 1, &["the teacher: ", WEIGHTS]);
    for (line, setting) in
        [(DISTILL, "real_score.guidance_scale is 2"), ("pairs teacher --out p -n 2", "--guidance is 2")]
    {
        w.refuses(&format!("{line} --guidance 2"), 1, &[setting, "knows no pictures without a class"]);
    }
    w.write("teacher/dmd.json", r#"{"kind": "teacher", "version": "0.1.0", "null_class": true}"#);
    w.refuses(&format!("{DISTILL} --guidance 2"), 1, &["the teacher: ", WEIGHTS]);
    w.refuses(&format!("{paired} --guidance 2"), 1, &["pairs: pairs were made with guidance 1", "scale is 2"]);
    w.edit_json("pairs/pairs.json", |m| m["shape"] = json!([1, 8, 8]));
    w.refuses(&paired, 1, &["pictures are [1, 8, 8], the teacher's [3, 8, 8]"]);

    // Without classes there is nothing to leave out, whatever it is trained with.
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.write(WEIGHTS, "no weights");
    for line in [DISTILL, "pairs teacher --out p -n 2"] {
        let message = w.refuses(&format!("{line} --guidance 2"), 1, &["the teacher has no classes"]);
        assert!(!message.contains("--label-dropout"), "{message}");
    }
}

/// Shards of the right size with the wrong content: labels that the teacher has not, none at all, values that are none.
#[test]
fn pairs_with_wrong_labels_or_values_are_refused() {
    let w = Workplace::new().with_fixture("edm-tiny");
    let make = "pairs teacher --out pairs -n 5 --steps 2 --per-shard 3";
    w.ok(make);
    let (line, path) = (format!("{DISTILL} --recipe dmd --pairs pairs"), "pairs/shard-00001.safetensors");
    let whole = std::fs::read(w.path(path)).unwrap();
    let with = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let parsed = SafeTensors::deserialize(&whole).unwrap();
        let mut tensors: BTreeMap<String, TensorView> = parsed.tensors().into_iter().collect();
        let old = tensors.remove(name).unwrap();
        let mut bytes = old.data().to_vec();
        change(&mut bytes);
        if !bytes.is_empty() {
            tensors.insert(name.into(), TensorView::new(old.dtype(), old.shape().to_vec(), &bytes).unwrap());
        }
        w.write(path, safetensors::serialize(tensors, None).unwrap());
    };
    for label in [3i64, -1, i64::MAX] {
        with("label", &|bytes| bytes[8..16].copy_from_slice(&label.to_le_bytes()));
        w.refuses(&line, 1, &[path, "labels are not those of the teacher's 3 classes", "dmd pairs"]);
    }
    with("label", &|bytes| bytes.clear());
    w.refuses(&line, 1, &[path, "labels are not those of the teacher's 3 classes"]);
    for name in ["noise", "image"] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            with(name, &|bytes| bytes[40..44].copy_from_slice(&value.to_le_bytes()));
            let tensor = format!("tensor \"{name}\" holds values that are not finite; run `dmd pairs` again");
            w.refuses(&line, 1, &[path, &tensor]);
        }
    }
    assert_eq!(w.ok(make)["made"], 2);
    assert!(std::fs::read(w.path(path)).unwrap() == whole, "made anew, it is the same");

    // A teacher that makes no numbers makes no pairs of them.
    let mut bytes = std::fs::read(w.path(WEIGHTS)).unwrap();
    let last = bytes.len() - 2;
    bytes[last..].copy_from_slice(&0x7e00_u16.to_le_bytes());
    w.write(WEIGHTS, bytes);
    w.fails("pairs teacher --out broken -n 5 --steps 2 --per-shard 3", 1, &["not finite, among pictures 0 to 2"]);
    assert!(!w.path("broken/shard-00000.safetensors").exists());
}

/// Pairs of another teacher, size, guidance, or damaged ones.
#[test]
fn pairs_that_do_not_fit_are_refused() {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.ok("pairs teacher --out pairs -n 5 --steps 2 --per-shard 3");
    let line = format!("{DISTILL} --recipe dmd --pairs pairs");
    let shard = std::fs::read(w.path("pairs/shard-00001.safetensors")).unwrap();
    w.write("pairs/shard-00001.safetensors", &shard[..shard.len() - 5]);
    w.refuses(&line, 1, &["pairs/shard-00001.safetensors: missing or damaged; run `dmd pairs` again"]);
    assert_eq!(w.ok("pairs teacher --out pairs -n 5 --steps 2 --per-shard 3")["made"], 2);
    assert!(std::fs::read(w.path("pairs/shard-00001.safetensors")).unwrap() == shard, "made anew, it is the same");
    w.refuses("pairs teacher --out pairs -n 6 --steps 2 --per-shard 3", 1, &["made otherwise (n is 6, was 5)"]);

    let manifest = w.text("pairs/pairs.json");
    w.edit_json("pairs/pairs.json", |m| m["guidance_scale"] = json!(2.0));
    w.refuses(&line, 1, &["pairs were made with guidance 2, real_score.guidance_scale is 1"]);
    w.write("pairs/pairs.json", &manifest);
    w.edit_json("pairs/pairs.json", |m| m["shape"] = json!([3, 16, 16]));
    w.refuses(&line, 1, &["pictures are [3, 16, 16], the teacher's [3, 8, 8]"]);
    w.write("pairs/pairs.json", &manifest);
    w.edit_json("teacher/scheduler/scheduler_config.json", |scheduler| scheduler["sigma_data"] = json!(0.6));
    w.refuses(&line, 1, &["pairs were made by another teacher"]);
}

#[test]
fn recipes_are_shown_whole_and_can_be_changed() {
    let w = Workplace::new();
    for recipe in ["plain", "dmd", "dmd2", "f-js", "sid", "sida", "fast"] {
        let output = w.run(&format!("config show --recipe {recipe} --steps 7"));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains("steps = 7"), "{recipe}: {text}");
        // What is shown can be given back, and says the same again.
        w.write("shown.toml", &text);
        let again = w.run("config show --config shown.toml");
        assert_eq!(String::from_utf8(again.stdout).unwrap(), text, "{recipe}");
    }
    w.write("mine.toml", "[loss.gan]\nweight = 0.5\n");
    let shown = w.ok("config show --recipe dmd2 --config mine.toml --set loss.gan.r1=2 --set generator.sigma=max");
    assert_eq!(shown["loss"]["gan"]["weight"], 0.5);
    assert_eq!(shown["loss"]["gan"]["critic_weight"], 0.03);
    assert_eq!(shown["loss"]["gan"]["r1"], 2.0);
    assert_eq!(shown["generator"]["sigma"], "max");
}

#[test]
fn an_export_that_cannot_be_is_refused_with_its_remedy() {
    let w = generator();
    let export = "export run/generator --onnx a.onnx";
    w.refuses(&format!("{export} --dialect tflite"), 2, &["expected portable, nnapi or native"]);
    w.refuses(&format!("{export} --precision int4"), 2, &["expected fp32, fp16, w8 or w8a8"]);
    w.refuses(
        &format!("{export} --fixed-label d"),
        1,
        &["--fixed-label d: no such class, the model has a, b, c (0 to 2)"],
    );
    w.refuses(&format!("{export} --fixed-label 3"), 1, &["--fixed-label 3: no such class"]);
    w.refuses(&format!("{export} --max-size 20kB"), 1, &["--max-size allows 20000", "--precision fp16"]);
    w.refuses(&format!("{export} --batch 2 --dynamic-batch"), 2, &["--dynamic-batch"]);
    w.refuses(&format!("{export} --precision w8a8 --min-psnr 200"), 1, &["dB PSNR, expected 200.0", "--min-psnr"]);
    w.refuses(&format!("{export} --precision w8 --min-psnr nan"), 1, &["min_psnr_db is NaN, expected 0 or more"]);
    for (option, precisions) in [("--min-psnr 30", "fp16 or w8 or w8a8"), ("--max-drop-db 3", "w8a8")] {
        let remedy = format!("leave it out, or export with --precision {precisions}");
        w.refuses(&format!("{export} {option}"), 1, &["says nothing of a file in fp32", &remedy]);
    }
    w.refuses(&format!("{export} --as-generator"), 2, &["--sigma"]);
    w.refuses(&format!("{export} --as-generator --sigma 1"), 1, &["is a generator already"]);
    w.refuses("export teacher --onnx a.onnx", 1, &["is a teacher", "--as-generator --sigma S"]);
    let held = "export teacher --onnx a.onnx --as-generator --sigma";
    w.refuses(&format!("{held} 1000"), 1, &["--sigma is 1000, expected 0.002 to 80"]);
    w.write("a.onnx.report.html", "mine");
    w.refuses(&format!("{export} --report"), 1, &["a.onnx.report.html: exists already"]);
    w.ok(&format!("{held} 2.5"));
    assert_eq!(w.ok("inspect a.onnx")["sigmas"], json!([2.5]));
}

/// `/dev/full` takes no byte: a disk that is full.
#[cfg(target_os = "linux")]
#[test]
fn an_export_onto_a_full_disk_or_a_closed_folder_leaves_nothing() {
    let w = generator();
    for (full, options) in [("a.onnx", ""), ("a.onnx", "--external-data"), ("a.onnx.data", "--external-data")] {
        std::fs::create_dir(w.path("a.onnx.partial")).unwrap();
        std::os::unix::fs::symlink("/dev/full", w.path("a.onnx.partial").join(full)).unwrap();
        let line = format!("export run/generator --onnx a.onnx {options}");
        let message = w.fails(&line, 1, &["a.onnx: cannot write", "No space left"]);
        // The system's words stand there once.
        assert_eq!(message.matches("os error 28").count(), 1, "{message}");
        assert!(["a.onnx", "a.onnx.data", "a.onnx.partial"].iter().all(|name| !w.path(name).exists()), "{full}");
    }
    w.write("file", "no folder");
    w.refuses("export run/generator --onnx file/a.onnx", 1, &["file"]);
}

/// The report is there whole or not at all, and the error says what became of the file itself.
#[cfg(target_os = "linux")]
#[test]
fn a_report_that_does_not_fit_on_the_disk_leaves_the_file_and_says_so() {
    let w = generator();
    let line = "export run/generator --onnx a.onnx --precision w8 --report";
    let dmd = env!("CARGO_BIN_EXE_dmd");
    // The shell's number becomes the program's, by which the page is named until it is whole.
    let full = format!("ln -s /dev/full .a.onnx.report.html.$$.part; exec {dmd} {line}");
    let output = std::process::Command::new("sh").current_dir(w.path("")).args(["-c", &full]).output().unwrap();
    let parts = ["a.onnx: is written and whole, but not its report; --force makes both anew", "No space left"];
    check_failure(line, &output, 1, &parts);
    let left: Vec<_> = w.snapshot("").into_keys().filter(|path| path.to_string_lossy().contains("a.onnx")).collect();
    assert_eq!(left, [std::path::Path::new("a.onnx")]);
    assert_eq!(w.ok("inspect a.onnx")["precision"], "w8");
    w.refuses(line, 1, &["a.onnx: exists already", "--force"]);
}

/// A folder that cannot be written to, for whoever is not its owner's better.
#[cfg(unix)]
#[test]
fn a_folder_without_permission_is_named_and_left_as_it_was() {
    use std::os::unix::fs::PermissionsExt;
    let w = generator();
    w.ok("export run/generator --onnx a.onnx");
    std::fs::create_dir(w.path("closed")).unwrap();
    let permit = |mode: u32| std::fs::set_permissions(w.path("closed"), PermissionsExt::from_mode(mode)).unwrap();
    permit(0o555);
    if std::fs::write(w.path("closed/probe"), "").is_ok() {
        return eprintln!("skipped: this user may write everywhere");
    }
    let lists_operators = dmd_runtime::engines(None)[0].is_present();
    let operators = lists_operators.then_some("ort a.onnx --out b.ort --required-operators closed/b.config --force");
    let lines = [
        "export run/generator --onnx closed/b.onnx",
        "export run/generator --onnx closed/b.onnx --external-data",
        "ort a.onnx --out closed/b.ort",
    ];
    for line in lines.into_iter().chain(operators) {
        let message = w.fails(line, 1, &["closed/b.", "cannot write", "Permission denied"]);
        assert_eq!(message.matches("os error 13").count(), 1, "{message}");
        assert!(w.snapshot("closed").is_empty(), "{line}");
    }
    permit(0o755);
}

/// ONNX Runtime does not say that the disk is full.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_where_onnx_runtime_writes() {
    let w = generator();
    w.ok("export run/generator --onnx ours.onnx");
    if !dmd_runtime::engines(None)[0].is_present() {
        return eprintln!("skipped: no ONNX Runtime here");
    }
    for full in ["optimised.onnx", "generator.ort"] {
        std::fs::create_dir(w.path("a.ort.partial")).unwrap();
        std::os::unix::fs::symlink("/dev/full", w.path("a.ort.partial").join(full)).unwrap();
        let message = w.fails("ort ours.onnx --out a.ort", 1, &["a.ort: cannot write: No space left"]);
        assert!(message.matches("os error 28").count() == 1 && !message.contains("cannot load"), "{message}");
        assert!(!w.path("a.ort").exists() && !w.path("a.ort.partial").exists(), "{full}");
    }
}

/// The words of the system stand in a message once, whichever crate passes them on.
#[test]
fn the_reason_of_the_system_is_given_once() {
    let w = generator();
    std::fs::remove_file(w.path("run/generator/scheduler/scheduler_config.json")).unwrap();
    for line in
        ["lint missing.onnx --target cpu", "sample missing.onnx --npy a.npy", "export run/generator --onnx a.onnx"]
    {
        let message = w.refuses(line, 1, &["No such file or directory"]);
        assert_eq!(message.matches("os error 2").count(), 1, "{message}");
    }
}

/// What a network cannot be in a dialect or a precision, through the command line.
#[test]
fn what_a_dialect_lacks_is_refused_by_its_node_and_what_half_precision_cannot_hold_is_kept() {
    let held = "export teacher --onnx a.onnx --as-generator --sigma 2.5";
    let w = Workplace::new().with_fixture("edm-tiny");
    w.edit_json("teacher/unet/config.json", |unet| unet["act_fn"] = json!("gelu"));
    w.refuses(&format!("{held} --dialect nnapi"), 1, &["gelu\"", "no error function", "--dialect portable"]);
    w.ok(&format!("{held} --dialect native"));

    let w = Workplace::new().with_fixture("edm-tiny");
    let bytes = std::fs::read(w.path(WEIGHTS)).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<String, TensorView> = parsed.tensors().into_iter().collect();
    // Large before a norm, which hides it from the picture.
    let name = "down_blocks.0.resnets.0.conv1.bias";
    let shape = tensors[name].shape().to_vec();
    let large: Vec<u8> = (0..shape[0]).flat_map(|i| (1e5 * (i as f32 + 1.0)).to_le_bytes()).collect();
    tensors.insert(name.into(), TensorView::new(safetensors::Dtype::F32, shape, &large).unwrap());
    w.write(WEIGHTS, safetensors::serialize(tensors, None).unwrap());
    let kept = w.ok(&format!("{held} --precision fp16"))["kept_float"].to_string();
    assert!(kept.contains("\"down_blocks.0.resnets.0.conv1\""), "{kept}");
    w.ok(&format!("{held} --precision w8 --force"));
}

/// An engine that is asked for and missing: the checks that were not made are named, and the exit code says so.
#[test]
fn a_report_without_an_engine_says_what_was_not_checked() {
    let w = generator();
    w.write("none.so", "no library");
    let run = |line: &str| {
        let mut command = w.command(line);
        // Nowhere to find a library: not by the variable, not in a Python, not at home.
        command
            .env("ORT_DYLIB_PATH", w.path("none.so"))
            .env("PATH", "")
            .env("HOME", w.path(""))
            .env_remove("VIRTUAL_ENV");
        command.output().unwrap()
    };
    let export = "export run/generator --onnx a.onnx --engine onnxruntime --report";
    let output = run(export);
    if output.status.success() {
        return eprintln!("skipped: the system's own loader finds ONNX Runtime here");
    }
    check_failure(export, &output, 1, &["no engine could check the file", "ONNX Runtime", "--allow-unverified"]);
    assert!(!w.path("a.onnx").exists() && !w.path("a.onnx.report.html").exists());
    let output = run(&format!("{export} --allow-unverified"));
    assert!(output.status.success(), "{}", common::stderr(&output));
    assert!(common::stderr(&output).contains("likeness and latency were not checked"));
    assert!(w.text("a.onnx.report.html").contains("Not checked: no engine is present"));
}
