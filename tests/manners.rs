//! What people meet at the command line: runs in the place of models, options that would be passed over, pictures as files,
//! scores that say what they are worth.

mod common;

use common::{Workplace, stderr};
use serde_json::json;

/// An 8×8 teacher of three classes, and a run distilled from it.
fn distilled() -> Workplace {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.ok("distill --teacher teacher --out run --steps 1 --batch 2 --set ratio=1");
    w
}

#[test]
fn a_run_stands_for_its_generator() {
    let w = distilled();
    w.ok("sample run --npy run.npy -n 3");
    w.ok("sample run/generator --npy generator.npy -n 3");
    assert_eq!(w.npy("run.npy"), w.npy("generator.npy"));
    w.ok("export run --onnx g.onnx");
    assert_eq!(w.ok("score run --against run -n 4")["scores"][0]["pictures"], 4);
    std::fs::rename(w.path("run/generator"), w.path("elsewhere")).unwrap();
    w.refuses("sample run --npy a.npy", 1, &["run: is a run without a generator yet"]);
}

#[test]
fn options_that_would_be_passed_over_are_refused() {
    let w = distilled();
    w.ok("export run --onnx g.onnx");
    for (line, option) in [
        ("sample run --npy a.npy --guidance 3", "--guidance"),
        ("sample run --npy a.npy --sampler euler", "--sampler"),
        ("sample run --npy a.npy --engine tract", "--engine"),
        ("sample g.onnx --npy a.npy --guidance 3", "--guidance"),
        ("sample g.onnx --npy a.npy --sampler heun", "--sampler"),
        ("sample g.onnx --npy a.npy --device cpu", "--device"),
        ("sample g.onnx --npy a.npy --batch 2", "--batch"),
        ("score g.onnx --against g.onnx -n 4 --device cpu", "--device"),
        ("score run --against g.onnx -n 4 --guidance 2", "--guidance"),
        ("distill --teacher teacher --out b --steps 1 --data pictures", "--data"),
        ("distill --teacher teacher --out b --steps 1 --pairs pairs", "--pairs"),
    ] {
        w.refuses(line, 2, &[&format!("{option} has no effect here")]);
    }
}

#[test]
fn a_folder_in_the_place_of_a_file_is_told_the_way_to_one() {
    let w = distilled();
    for line in ["bench run run", "lint run --target nnapi"] {
        w.refuses(line, 1, &["run: is a folder, expected an exported file: dmd export run --onnx FILE.onnx makes one"]);
    }
    w.refuses(
        "distill --teacher teacher --out b --precision bf16 --device cpu",
        2,
        &["precision is bf16, which needs a GPU"],
    );
}

#[test]
fn an_exported_file_is_known_under_any_name() {
    let w = distilled();
    w.ok("export run --onnx g.onnx");
    w.ok("ort g.onnx --out g.ort");
    for (file, other) in [("g.onnx", "onnx.bin"), ("g.ort", "ort.bin")] {
        std::fs::copy(w.path(file), w.path(other)).unwrap();
        w.ok(&format!("sample {file} --npy a.npy -n 3 --force"));
        w.ok(&format!("sample {other} --npy b.npy -n 3 --force"));
        assert_eq!(w.npy("a.npy"), w.npy("b.npy"), "{other}");
    }
}

#[test]
fn numbers_that_only_a_slip_makes_are_refused_before_memory_is_taken() {
    let w = distilled();
    for (line, expected) in [
        ("sample run --npy a.npy -n 99999999999", "-n is 99999999999, expected 1 to"),
        ("sample teacher --npy a.npy --steps 99999999999", "--steps is 99999999999, expected 1 to"),
        ("sample run --npy a.npy --batch 99999999999", "--batch is 99999999999, expected 1 to"),
        ("sample run --npy a.npy -n 0", "-n is 0, expected 1 to"),
        ("score run --against run -n 99999999999", "-n is 99999999999, expected 2 to"),
        ("score run --against run -n 1", "-n is 1, expected 2 to"),
    ] {
        w.refuses(line, 2, &[expected]);
    }
    let mut many = std::process::Command::new(env!("CARGO_BIN_EXE_dmd"));
    let output = many.current_dir(w.path("")).args(["--threads", "20000", "inspect", "teacher"]).output().unwrap();
    assert!(
        output.status.success() && stderr(&output).contains("--threads 20000 are too many for this machine"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn pictures_are_written_as_their_names_say_and_single_ones_can_be_trained_on() {
    let w = distilled();
    w.ok("sample run --out a.jpg -n 1");
    assert!(std::fs::read(w.path("a.jpg")).unwrap().starts_with(b"\xff\xd8"));
    w.refuses("sample run --out a.xyz", 2, &["a.xyz: pictures are written as .png, .jpg"]);
    w.ok("sample run --pictures set -n 6 --seed 3 --npy raw.npy");
    let names = ["0", "1", "2"].map(|class| std::fs::read_dir(w.path("set").join(class)).unwrap().count());
    assert_eq!(names, [2, 2, 2]);
    let single = image::open(w.path("set/1/seed3-00004.png")).unwrap().into_rgb8();
    assert_eq!(single.dimensions(), (8, 8));
    let raw = w.npy("raw.npy");
    assert_eq!(single.get_pixel(5, 2).0, [0, 1, 2].map(|c| dmd::picture::to_byte(raw[[4, c, 2, 5]])));
    w.refuses("sample run --pictures set -n 6 --seed 3", 1, &["set/0/seed3-00000.png: exists already"]);
    w.write("unet.json", common::TINY_UNET);
    let trained = w.run("teacher train --data set --out new --unet unet.json --size 8 --steps 1 --batch 2");
    assert!(stderr(&trained).contains("6 pictures, 8x8, 3 channels, 3 classes (0, 1, 2)"), "{}", stderr(&trained));
}

/// The weights' last value is no number.
#[test]
fn pictures_that_are_no_numbers_are_an_error() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    let weights = "teacher/unet/diffusion_pytorch_model.safetensors";
    let mut bytes = std::fs::read(w.path(weights)).unwrap();
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&[0x00, 0x7e]);
    w.write(weights, bytes);
    w.refuses("sample teacher --npy a.npy -n 1 --steps 1", 1, &["picture 0 of the teacher", "not finite"]);
    w.refuses("score teacher --against teacher -n 2", 1, &["not finite"]);
}

#[test]
fn scores_have_an_interval_and_a_floor_and_few_pictures_a_warning() {
    let w = Workplace::new().with_fixture("ddpm-tiny").with_pictures();
    let scored = w.ok("score teacher --against teacher -n 64");
    let score = &scored["scores"][0];
    let number = |name: &str| score[name].as_f64().unwrap();
    let (value, floor) = (number("sliced_wasserstein"), number("sliced_wasserstein_floor"));
    let interval: Vec<f64> = serde_json::from_value(score["sliced_wasserstein_interval"].clone()).unwrap();
    assert!(interval[0] < value && value < interval[1], "{score}");
    // The teacher against itself, from other noise: at the floor.
    assert!(value > 0.0 && (interval[0] - 0.2 * floor..interval[1] + 0.2 * floor).contains(&floor), "{score}");
    // The flat folder has no classes, and needs none.
    let output = w.run("score teacher --against pictures -n 8 --features teacher");
    let (stdout, said) = (String::from_utf8(output.stdout.clone()).unwrap(), stderr(&output));
    assert!(said.contains("warning: 8 pictures: fewer than 1000"), "{said}");
    for part in ["sliced Wasserstein", " ± ", "floor", "kernel distance (KID)", "Fréchet distance (FID)"] {
        assert!(stdout.contains(part), "{stdout}");
    }
}

#[test]
fn what_a_score_needs_is_looked_for_before_anything_is_scored() {
    let w = Workplace::new().with_fixture("edm-tiny").with_pictures();
    let message = w.refuses("score teacher --against teacher --against missing -n 8", 1, &["missing: cannot read"]);
    assert!(!message.contains("sliced"), "{message}");
    w.refuses(
        "score teacher --against teacher -n 8 --features none.onnx",
        1,
        &["--features none.onnx: no such file or folder"],
    );
    w.refuses(
        "score teacher --against pictures -n 8",
        1,
        &["class \"blue\" is none of the model's (0, 1, 2)", "dmd.json"],
    );
    // A flat folder is scored against each class in turn.
    std::fs::rename(w.path("pictures/blue"), w.path("flat")).unwrap();
    assert_eq!(w.ok("score teacher --against flat -n 8")["scores"][0]["pictures"], 8);
}

/// Neither `sample` nor `pairs` makes a picture that a score draws, whatever the seed.
#[test]
fn the_noise_of_scores_is_nobody_elses() {
    use dmd::random::Purpose;
    let of = |purpose: u32, seed: u64| dmd_runtime::noise::Stream::new(seed, purpose, 0).normal(8);
    let reference = of(Purpose::Reference as u32, 0);
    for seed in 0..64 {
        assert_ne!(dmd_runtime::picture_noise(seed, 0, 1, [2, 2, 2]).into_raw_vec_and_offset().0, reference);
        assert_ne!(of(Purpose::Scored as u32, seed), reference);
    }
}

/// `tests/fixtures/features.onnx` (see `features.rs`), by ONNX Runtime where its library is found, else on candle.
#[test]
fn features_are_fed_as_the_file_beside_the_network_says() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.write("net.onnx", std::fs::read("tests/fixtures/features.onnx").unwrap());
    let score = |w: &Workplace| w.ok("score teacher --against teacher -n 24 --features net.onnx")["scores"][0].clone();
    let plain = score(&w);
    assert_eq!(plain["features"]["dimension"], json!(10));
    assert!(plain["frechet_distance"].as_f64().is_some_and(|x| x > 0.0), "{plain}");
    w.write("net.toml", "range = [0, 1]\noutput = [\"pooled\"]\n");
    let fed = score(&w);
    assert_eq!(fed["features"]["dimension"], json!(4));
    assert!(fed["features"]["by"].as_str().unwrap().contains("fed [0, 1]"), "{fed}");
    w.write("net.toml", "range = [0, 0]\n");
    w.refuses("score teacher --against teacher -n 24 --features net.onnx", 1, &["net.toml", "two different numbers"]);
}

#[test]
fn results_go_to_stdout_and_names_command_no_terminal() {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.write(
        "teacher/dmd.json",
        json!({ "kind": "teacher", "version": "0.1.0", "classes": ["a\u{1b}[2J", "b", "c"] }).to_string(),
    );
    let output = w.run("inspect teacher");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(text.contains("sigma_range") && text.contains("a\\u{1b}[2J, b, c"), "{text}");
    let message = w.fails("sample teacher --npy a.npy --class fox", 1, &["a\\u{1b}[2J, b, c"]);
    assert!(!message.contains('\u{1b}'), "{message}");
}

#[test]
fn what_a_model_predicts_is_told_in_words_and_named_for_programs() {
    let w = Workplace::new().with_fixture("ddpm-tiny");
    let found = w.ok("inspect teacher");
    assert_eq!((&found["prediction"], &found["predicts"]), (&json!("Epsilon"), &json!("noise (epsilon)")));
    let text = String::from_utf8(w.run("inspect teacher").stdout).unwrap();
    assert!(text.contains("noise (epsilon)") && !text.contains("Epsilon") && !text.contains("steps"), "{text}");
}

#[test]
fn a_decoder_that_is_not_whole_is_named_as_that_of_latents() {
    let w = Workplace::new().with_fixture("edm-tiny");
    w.write("teacher/vqvae/config.json", r#"{"_class_name": "VQModel", "latent_channels": 3}"#);
    w.edit_json("teacher/model_index.json", |index| index["vqvae"] = json!(["diffusers", "VQModel"]));
    let parts = [
        "the decoder of the latents that the model makes: ",
        "teacher/vqvae: has no diffusion_pytorch_model.safetensors",
    ];
    w.refuses("distill --teacher teacher --out run --steps 1 --batch 2", 1, &parts);
}
