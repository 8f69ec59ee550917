//! Latent teachers and those of text that diffusers wrote, sampled whole: prompt to pixels. Expected pictures are of
//! `models/tests/make_encoder_fixtures.py`, ten Euler steps of diffusers 0.42.1.

mod common;
use candle_core::{DType, Device};
use common::{Workplace, stderr};
use dmd_models::Weights;
use dmd_runtime::{FolderInfo, ModuleInfo};
use ndarray::Array4;
use serde_json::json;
use std::collections::BTreeMap;
use std::process::Output;

/// A pipeline in `teacher`, its noise in `noise.npy`.
fn with_pipeline(name: &str) -> Workplace {
    let w = Workplace::new().with_fixture(&format!("encoders/pipelines/{name}"));
    dmd::npy::write(&w.path("noise.npy"), &stored(&w, "noise")).unwrap();
    w
}

fn stored(w: &Workplace, name: &str) -> Array4<f32> {
    let io = Weights::load(&w.path("teacher/io.safetensors"), &Device::Cpu).unwrap();
    let tensor = io.get(name).unwrap();
    Array4::from_shape_vec(tensor.dims4().unwrap(), tensor.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

/// `dmd sample teacher` with these words and others that may hold spaces.
fn sample(w: &Workplace, line: &str, words: &[&str]) -> Output {
    w.command(&format!("sample teacher {line}")).args(words).output().unwrap()
}

/// Peak signal to noise of pictures in [-1, 1], as bytes would show them.
fn psnr(found: &Array4<f32>, expected: &Array4<f32>) -> f64 {
    assert_eq!(found.dim(), expected.dim());
    let shown = |v: &f32| f64::from(v / 2.0 + 0.5).clamp(0.0, 1.0);
    let error: f64 = found.iter().zip(expected).map(|(a, b)| (shown(a) - shown(b)).powi(2)).sum();
    -10.0 * (error / found.len() as f64).max(1e-12).log10()
}

const CAT: [&str; 2] = ["--prompt", "a photo of a cat"];
const STEPS: &str = "--sampler euler --steps 10 --noise noise.npy --npy pictures.npy --force";

#[test]
fn whole_pictures_are_those_of_diffusers() {
    for (name, options, prompt) in
        [("sd", "--negative hat --guidance 7.5", &CAT[..]), ("sdxl", "", &CAT[..]), ("ldm", "", &[])]
    {
        let w = with_pipeline(name);
        let output = sample(&w, &format!("{STEPS} --latents latents.npy {options}"), prompt);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let found = psnr(&w.npy("pictures.npy"), &stored(&w, "picture"));
        let (latents, expected) = (w.npy("latents.npy"), stored(&w, "latents"));
        let largest = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
        let gap = latents.iter().zip(&expected).fold(0f32, |gap, (a, b)| gap.max((a - b).abs())) / largest;
        assert!(found >= 60.0 && gap < 2e-5, "{name}: {found} dB, latents {gap} of the largest");
    }
}

/// The negative prompt, the guidance and each of SDXL's two texts count.
#[test]
fn what_a_teacher_of_text_is_told_shows() {
    for name in ["sd", "sdxl"] {
        let w = with_pipeline(name);
        let of = |line: &str, words: &[&str]| {
            let output = sample(&w, &format!("{STEPS} {line}"), words);
            assert!(output.status.success(), "{}", stderr(&output));
            w.npy("pictures.npy")
        };
        let plain = of("", &CAT);
        let usual = if name == "sd" { "--guidance 7.5" } else { "--guidance 5" };
        assert_eq!(of(usual, &CAT), plain);
        for (line, words) in
            [("--guidance 2", &CAT[..]), ("--negative hat", &CAT[..]), ("", &["--prompt", "a photo of a hat"])]
        {
            assert!(psnr(&of(line, words), &plain) < 50.0, "{name}: {line} {words:?} changes nothing");
        }
    }
}

#[test]
fn prompts_of_a_file_are_drawn_in_turn_with_their_words_below() {
    let w = with_pipeline("sd");
    w.write("prompts.txt", "a photo of a cat\n\nhello\n");
    let output = sample(&w, "--prompts prompts.txt -n 3 --steps 2 --out grid.png --npy a.npy --pictures each", &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("2 prompts, 1 empty lines left out"), "{}", stderr(&output));
    assert_eq!(w.npy("a.npy").dim(), (3, 3, 16, 16));
    let grid = image::open(w.path("grid.png")).unwrap();
    // Three columns of 128 pixels, captions of one line of 10 pixels below.
    assert_eq!((grid.width(), grid.height()), (3 * 130 + 2, 128 + 2 + 10 + 2 + 2));
    let result = w.ok("sample teacher --prompts prompts.txt --steps 2 --npy b.npy");
    assert_eq!((&result["pictures"], &result["prompts"]), (&json!(2), &json!(["a photo of a cat", "hello"])));
    let (a, b) = (w.npy("a.npy"), w.npy("b.npy"));
    assert_eq!(a.slice(ndarray::s![..2, .., .., ..]), b);
    w.write("long.txt", "a photo of a cat ".repeat(20));
    let said = stderr(&w.run("sample teacher --prompts long.txt --steps 2 --npy c.npy"));
    assert!(
        said.contains("more than the 22 tokens that the text encoder reads; left out: \"of a cat a photo"),
        "{said}"
    );
}

#[test]
fn another_size_is_made_where_it_is_asked_for() {
    for name in ["sd", "sdxl"] {
        let w = with_pipeline(name);
        let output = sample(&w, "--size 24x16 -n 1 --steps 2 --npy a.npy --latents b.npy", &CAT);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!((w.npy("a.npy").dim(), w.npy("b.npy").dim()), ((1, 3, 24, 16), (1, 4, 12, 8)));
    }
    let w = with_pipeline("sd");
    w.refuses(
        "sample teacher --size 15 --prompt a --npy a.npy",
        1,
        &["sides of this model's pictures are multiples of 2"],
    );
}

/// bf16, shards, and a part under the name of its only variant.
#[test]
fn parts_may_lie_in_shards_and_in_less_precision() {
    let w = with_pipeline("sd");
    let path = |name: &str| w.path(&format!("teacher/text_encoder/{name}"));
    let weights = Weights::load(&path("model.safetensors"), &Device::Cpu).unwrap();
    let mut shards = [Weights::default(), Weights::default()];
    let mut map = BTreeMap::new();
    for (i, (name, tensor)) in weights.iter().enumerate() {
        shards[i % 2].insert(name, tensor.to_dtype(DType::BF16).unwrap());
        map.insert(name.to_string(), format!("model-0000{}-of-00002.safetensors", i % 2 + 1));
    }
    for (i, shard) in shards.iter().enumerate() {
        shard.save(&path(&format!("model-0000{}-of-00002.safetensors", i + 1)), &BTreeMap::new()).unwrap();
    }
    std::fs::remove_file(path("model.safetensors")).unwrap();
    w.write("teacher/text_encoder/model.safetensors.index.json", json!({ "weight_map": map }).to_string());
    let vae = |name: &str| w.path(&format!("teacher/vae/{name}"));
    let plain = "diffusion_pytorch_model.safetensors";
    std::fs::rename(vae(plain), vae("diffusion_pytorch_model.fp16.safetensors")).unwrap();
    let output = sample(&w, &format!("{STEPS} --negative hat"), &CAT);
    assert!(output.status.success(), "{}", stderr(&output));
    let found = psnr(&w.npy("pictures.npy"), &stored(&w, "picture"));
    // Eight bits of mantissa in the place of eleven, of one part.
    assert!((40.0..110.0).contains(&found), "{found} dB");
}

#[test]
fn a_safety_checker_is_passed_over_and_said() {
    let w = with_pipeline("sd");
    w.write("teacher/safety_checker/config.json", r#"{"architectures": ["StableDiffusionSafetyChecker"]}"#);
    let output = sample(&w, "-n 1 --steps 1 --npy a.npy", &CAT);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("its safety checker is not used").count(), 1, "{}", stderr(&output));
}

#[test]
fn folders_that_do_not_fit_together_are_refused() {
    let refused = |name: &str, change: &dyn Fn(&Workplace), parts: &[&str]| {
        let w = with_pipeline(name);
        change(&w);
        w.refuses("sample teacher --prompt cat --npy a.npy", 1, parts);
    };
    let remove =
        |part: &'static str| move |w: &Workplace| std::fs::remove_dir_all(w.path(&format!("teacher/{part}"))).unwrap();
    for part in ["vae", "text_encoder", "tokenizer"] {
        refused("sd", &remove(part), &[&format!("names a part {part}"), "which is not there"]);
    }
    let drop_from_index = |w: &Workplace| {
        remove("tokenizer_2")(w);
        w.edit_json("teacher/model_index.json", |index| _ = index.as_object_mut().unwrap().remove("tokenizer_2"));
    };
    refused("sdxl", &drop_from_index, &["has a text_encoder_2/ and no tokenizer_2/"]);
    let second_alone = |w: &Workplace| {
        for part in ["text_encoder_2", "tokenizer_2"] {
            remove(part)(w);
            w.edit_json("teacher/model_index.json", |index| _ = index.as_object_mut().unwrap().remove(part));
        }
    };
    refused("sdxl", &second_alone, &["text encoders tell 16 channels of a token, the network expects 32"]);
    let of = |file: &'static str, key: &'static str, value: serde_json::Value| {
        move |w: &Workplace| w.edit_json(&format!("teacher/{file}"), |config| config[key] = value.clone())
    };
    let nine = of("unet/config.json", "in_channels", json!(9));
    refused("sd", &nine, &["in_channels 9 and out_channels 4 differ", "inpainting"]);
    let t5 = |w: &Workplace| {
        of("text_encoder/config.json", "architectures", json!(["T5EncoderModel"]))(w);
        of("model_index.json", "text_encoder", json!(["transformers", "T5EncoderModel"]))(w);
    };
    refused("sd", &t5, &["text_encoder/ folder (T5EncoderModel), which reads text", "CLIP's text encoders"]);
    let other_decoder = |w: &Workplace| {
        std::fs::remove_dir_all(w.path("teacher/vae")).unwrap();
        let from =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/encoders/autoencoders/vq");
        std::fs::create_dir(w.path("teacher/vae")).unwrap();
        for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
            std::fs::copy(from.join(file), w.path(&format!("teacher/vae/{file}"))).unwrap();
        }
    };
    refused("sd", &other_decoder, &["the decoder takes latents of 3 channels, the network makes 4"]);
    let small = of("text_encoder/config.json", "vocab_size", json!(500));
    refused("sd", &small, &["has shape [529, 16], expected [500, 16]"]);
}

#[test]
fn files_that_are_no_folder_say_what_to_do() {
    let w = with_pipeline("sd");
    w.write("model.ckpt", b"PK\x03\x04\x00\x00archive/data.pkl");
    w.refuses(
        "sample model.ckpt --npy a.npy",
        1,
        &["pickled weights", "from_single_file(FILE).save_pretrained(FOLDER)"],
    );
    let save = |name: &str, tensor: &str| {
        let mut weights = Weights::default();
        weights.insert(tensor, candle_core::Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
        weights.save(&w.path(name), &BTreeMap::new()).unwrap();
    };
    save("lora.safetensors", "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight");
    w.refuses("sample lora.safetensors --npy a.npy", 1, &["is a LoRA", "fuse_lora()"]);
    save("v1-5.safetensors", "model.diffusion_model.input_blocks.0.0.weight");
    w.refuses("sample v1-5.safetensors --npy a.npy", 1, &["is a whole model in one file", "dmd convert"]);
}

const FOUR: &str = "a photo of a cat\na photo of a hat\nhello\na cat in a hat\n";
/// Few updates of small batches, all numbers written.
const SHORT: &str = "distill --teacher teacher --out run --batch 4 --set ratio=1 --set log_every=1";

/// Teachers with latents of their own, and prompts where they are told text.
fn with_latent_teacher(name: &str) -> (Workplace, &'static str) {
    let w = with_pipeline(name);
    w.write("prompts.txt", FOUR);
    (w, if name == "ldm" { "" } else { "--prompts prompts.txt --guidance 3" })
}

fn metric(w: &Workplace, run: &str, name: &str) -> Vec<f64> {
    let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()[name].as_f64();
    w.text(&format!("{run}/metrics.jsonl")).lines().filter_map(line).collect()
}

#[test]
fn latent_teachers_become_generators_that_take_prompts() {
    for name in ["sd", "sdxl", "ldm"] {
        let (w, told) = with_latent_teacher(name);
        w.ok(&format!("{SHORT} --steps 3 {told} --set sample_every=3"));
        for part in std::fs::read_dir(w.path("teacher")).unwrap().map(Result::unwrap).filter(|e| e.path().is_dir()) {
            let there = w.path("run/generator").join(part.file_name());
            assert!(there.is_dir(), "{name}: {}", there.display());
        }
        let class = |folder: &str| -> serde_json::Value {
            let index: serde_json::Value =
                serde_json::from_str(&w.text(&format!("{folder}/model_index.json"))).unwrap();
            index["_class_name"].clone()
        };
        assert_eq!(class("run/generator"), class("teacher"));
        // Measured at the checkpoint, where there are prompts.
        let effect = metric(&w, "run", "prompt_effect");
        assert!(
            effect.len() == usize::from(!told.is_empty()) && effect.iter().all(|effect| *effect > 0.0),
            "{effect:?}"
        );
        // Grids are decoded pictures, 16×16 drawn eight times as large; prompts in turn in a line or two below.
        let grid = image::open(w.path("run/samples/step-00000003.png")).unwrap();
        let line = if told.is_empty() { 0 } else { 2 + 10 };
        let side = |pictures: u32, below: u32| pictures * (128 + below + 2) + 2;
        assert_eq!((grid.width(), grid.height()), (side(4, 0), side(4, line)), "{name}");
        let prompt = if told.is_empty() { &[][..] } else { &CAT };
        let output = w.command("sample run -n 2 --npy a.npy --latents b.npy").args(prompt).output().unwrap();
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        assert_eq!((w.npy("a.npy").dim(), w.npy("b.npy").dim().1), ((2, 3, 16, 16), if name == "ldm" { 3 } else { 4 }));
    }
}

/// At the first update both scores are the teacher: unguided they agree, and guided by s they differ by s − 1 times what
/// the condition changes, if the fake score is not guided.
#[test]
fn guidance_is_the_real_score_s_alone() {
    let (w, _) = with_latent_teacher("sd");
    let gap = |run: &str, options: &[&str]| {
        let line = format!("{} --recipe plain --steps 1 --prompts prompts.txt", SHORT.replace("run", run));
        let output = w.command(&line).args(options).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        metric(&w, run, "score_gap")[0]
    };
    assert_eq!(gap("none", &["--guidance", "1"]), 0.0);
    let [two, four] = ["2", "4"].map(|scale| gap(scale, &["--guidance", scale]));
    assert!(two > 1e-6 && (four / two - 3.0).abs() < 1e-3, "{two}, {four}");
    let away = gap("away", &["--guidance", "2", "--negative", "a cat in a hat"]);
    assert!((away / two - 1.0).abs() > 1e-3, "{away}, {two}");
}

#[test]
fn a_run_of_text_goes_on_as_if_it_had_not_stopped() {
    let (w, told) = with_latent_teacher("sdxl");
    let line = |out: &str, steps: u64| {
        format!(
            "{} --recipe fast --steps {steps} {told} --set accumulate=2 --set checkpoint_every=2 --set sample_every=2",
            SHORT.replace("run", out)
        )
    };
    w.ok(&line("whole", 4));
    w.ok(&line("halves", 2));
    // Prompts in another place, and states that were lost, are the same.
    std::fs::rename(w.path("prompts.txt"), w.path("moved.txt")).unwrap();
    std::fs::remove_file(w.path("halves/text/shard-00000.safetensors")).unwrap();
    w.ok(&line("halves", 4).replace("prompts.txt", "moved.txt"));
    let mut of = ["whole", "halves"].map(|run| w.snapshot(run));
    for files in &mut of {
        common::without_times_in(files);
        // They name the file of the prompts, and that steps were added.
        files.retain(|path, _| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            !["config.toml", "changes.jsonl", "dmd.json"].contains(&&*name) && !path.starts_with("generator/unet")
        });
    }
    assert!(of[0].keys().eq(of[1].keys()), "{:?} {:?}", of[0].keys(), of[1].keys());
    for (path, bytes) in &of[0] {
        assert!(of[1][path] == *bytes, "{} differs", path.display());
    }
    w.write("moved.txt", FOUR.replace("hello", "goodbye"));
    let other = line("halves", 5).replace("prompts.txt", "moved.txt");
    w.refuses(&other, 1, &["the run was started with other prompts (the lines under --prompts differ)"]);
    w.write("moved.txt", FOUR);
    w.edit_json("teacher/text_encoder/config.json", |config| config["layer_norm_eps"] = json!(1e-4));
    w.refuses(&other, 1, &["the run was started with other text encoders or tokenizers"]);
}

/// With the same guidance of both scores nothing is left to follow at the first update, as without any; a critic that is
/// shown samples without their prompt learns something else.
#[test]
fn long_and_short_guidance_guides_the_critic_too() {
    let (w, _) = with_latent_teacher("sd");
    let run = |name: &str, more: &str| {
        let line =
            format!("{} --recipe plain --steps 2 --prompts prompts.txt --guidance 2", SHORT.replace("run", name));
        w.ok(&format!("{line} {more}"));
        [metric(&w, name, "score_gap")[0], metric(&w, name, "loss_fake")[0]]
    };
    let alone = run("alone", "");
    let both = run("both", "--set fake_score.guidance_scale=2");
    let silent = run("silent", "--set fake_score.dropout=0.5");
    assert!(alone[0] > 1e-6 && both[0] == 0.0 && silent[0] == alone[0], "{alone:?} {both:?} {silent:?}");
    assert!(both[1] != alone[1] && silent[1] != alone[1], "{alone:?} {both:?} {silent:?}");
    let rescaled = run("rescaled", "--set real_score.rescale=1");
    assert!(rescaled[0] > 1e-6 && rescaled[0] != alone[0], "{alone:?} {rescaled:?}");
    let w = Workplace::new().with_fixture("ddpm-tiny");
    let line = "distill --teacher teacher --out run --set";
    w.refuses(
        &format!("{line} fake_score.guidance_scale=2"),
        1,
        &["fake_score.guidance_scale is 2, but the teacher has no"],
    );
    w.refuses(&format!("{line} fake_score.dropout=0.1"), 1, &["fake_score.dropout is 0.1, but the teacher has no"]);
    w.refuses(&format!("{line} real_score.rescale=0.5"), 2, &["there is no guidance to rescale"]);
}

/// Stable Diffusion's table: sigma of 999, 749, 499, 249 and 399 by the formula of its betas, in f64 (numpy).
#[test]
fn a_generator_is_held_at_places_of_the_teacher_s_table() {
    let (w, told) = with_latent_teacher("sd");
    for (timestep, expected) in
        [("399", &[1.160_578][..]), ("[999,749,499,249]", &[14.614_641, 4.081_729, 1.612_886, 0.693_205])]
    {
        let run = format!("run{}", expected.len());
        w.ok(&format!("{} --steps 1 {told} --set generator.timestep={timestep}", SHORT.replace("run", &run)));
        let about: serde_json::Value = serde_json::from_str(&w.text(&format!("{run}/generator/dmd.json"))).unwrap();
        let steps = if expected.len() > 1 { about["steps"].clone() } else { json!([about["sigma"]]) };
        let found: Vec<f64> = serde_json::from_value(steps).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-5, "{found}, expected {expected}");
        }
        let output = w.command(&format!("sample {run} -n 2 --npy a.npy --force")).args(CAT).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
    }
    for (more, said) in [
        ("1000", "generator.timestep is 1000, expected below 1000"),
        ("[249,499]", "expected descending"),
        ("999 --set generator.sigma=1", "generator.sigma is given too"),
    ] {
        let line = format!("{SHORT} {told} --set generator.timestep={more}").replace("--out run", "--out other");
        let message = stderr(&w.run(&line));
        assert!(message.contains(said) && !w.path("other").exists(), "{message}");
    }
}

#[test]
fn pairs_of_a_text_teacher_are_made_compared_and_known_again() {
    let (w, _) = with_latent_teacher("sd");
    let with = "--prompts prompts.txt --guidance 2";
    w.refuses("pairs teacher --out pairs -n 6 --steps 2", 2, &["the teacher is told text: give --prompts FILE"]);
    w.ok(&format!("pairs teacher {with} --negative hat --out pairs -n 6 --steps 2 --per-shard 4"));
    w.ok(&format!("pairs teacher {with} --negative hat --out again -n 6 --steps 2 --per-shard 4 --batch 1"));
    let shard =
        |folder: &str| Weights::load(&w.path(&format!("{folder}/shard-00001.safetensors")), &Device::Cpu).unwrap();
    let (shard, again) = (shard("pairs"), shard("again"));
    assert_eq!(shard.get("image").unwrap().dims(), [2, 4, 8, 8]);
    let prompts = |shard: &Weights| shard.get("prompt").unwrap().to_vec1::<i64>().unwrap();
    assert!(prompts(&shard).iter().all(|i| (0..4).contains(i)) && prompts(&shard) == prompts(&again));
    std::fs::copy("tests/fixtures/features.onnx", w.path("features.onnx")).unwrap();
    for (distance, setting) in [("l2", "=l2"), ("features", "=teacher-features"), ("decoded", ".onnx=features.onnx")] {
        let line = format!("{} --recipe dmd --pairs pairs --steps 2 {with}", SHORT.replace("run", distance));
        w.ok(&format!("{line} --negative hat --set loss.regression.distance{setting}"));
        assert!(metric(&w, distance, "loss_regression").iter().all(|loss| *loss > 0.0), "{distance}");
    }
    let refused = |options: &str, said: &str| {
        w.refuses(&format!("{SHORT} --recipe dmd --pairs pairs {options}"), 1, &[said, "make pairs for this run"])
    };
    refused(with, "pairs were made away from another negative prompt");
    refused("--prompts prompts.txt --guidance 3 --negative hat", "made with guidance 2");
    w.write("other.txt", "hello\n");
    refused("--prompts other.txt --guidance 2 --negative hat", "of other prompts");
}

#[test]
fn models_of_text_are_scored_and_looked_into() {
    let (w, told) = with_latent_teacher("sd");
    w.ok(&format!("{SHORT} --steps 2 {told}"));
    w.refuses("score run --against teacher -n 4", 2, &["this model is told text: give --prompts FILE"]);
    let line = "score run --against teacher -n 4 --prompts prompts.txt --guidance 3 --features teacher";
    let score = &w.ok(line)["scores"][0];
    assert!(score["sliced_wasserstein"].as_f64().unwrap() > 0.0, "{score}");
    assert!(score["features"]["dimension"].as_u64().unwrap() > 0, "{score}");
    let levels = w.ok("ablate --teacher teacher --run run --out levels")["levels"].clone();
    assert!(levels.as_array().unwrap().iter().all(|l| l["gradient"].as_f64().unwrap() > 0.0), "{levels}");
    w.refuses("ablate --teacher teacher --out alone", 2, &["the teacher is told text: give --prompts FILE"]);
    w.ok("ablate --teacher teacher --out alone --prompts prompts.txt");
}

/// Twelve pictures of 20×16 with captions in `captioned`, by this kind of file.
fn write_captioned(w: &Workplace, kind: &str) {
    std::fs::create_dir_all(w.path("captioned/noto")).unwrap();
    let (mut jsonl, mut csv) = (String::new(), String::from("file_name,text\n"));
    for i in 0..12u32 {
        let picture =
            image::RgbImage::from_fn(20, 16, |x, y| image::Rgb([(x * 12) as u8, (y * 15) as u8, (20 * i) as u8]));
        picture.save(w.path(&format!("captioned/noto/{i}.png"))).unwrap();
        if kind == ".txt" {
            w.write(&format!("captioned/noto/{i}.txt"), format!("a photo of {i} cats\n"));
        }
        let captions = [format!("a photo of {i} cats"), format!("{i} cats, in \"hats\"")];
        jsonl += &(json!({"file": format!("noto/{i}.png"), "captions": captions}).to_string() + "\n");
        csv += &format!("noto/{i}.png,\"{}\"\n", captions[1].replace('"', "\"\""));
    }
    match kind {
        "captions.jsonl" => w.write("captioned/captions.jsonl", jsonl),
        "metadata.csv" => w.write("captioned/metadata.csv", csv),
        "metadata.jsonl" => {
            let of_folder = jsonl.replace("noto/", "").replace("\"file\"", "\"file_name\"");
            w.write("captioned/noto/metadata.jsonl", of_folder);
        }
        _ => {}
    }
}

#[test]
fn a_critic_of_latents_learns_from_captioned_pictures() {
    for kind in ["captions.jsonl", "metadata.jsonl", "metadata.csv", ".txt"] {
        let (w, _) = with_latent_teacher("sd");
        write_captioned(&w, kind);
        w.write("captioned/silent.png", std::fs::read(w.path("captioned/noto/1.png")).unwrap());
        let line = format!("{} --recipe dmd2 --data captioned --guidance 2", SHORT.replace("run", "captions"));
        let output = w.run(&format!("{line} --steps 2 --set checkpoint_every=1"));
        assert!(output.status.success(), "{kind}: {}", stderr(&output));
        let (said, n) = (stderr(&output), if kind == "captions.jsonl" || kind == "metadata.jsonl" { 24 } else { 12 });
        assert!(said.contains(&format!("{n} text states in")) && said.contains("12 latents in"), "{kind}: {said}");
        assert!(said.contains("1 pictures without captions are left out"), "{kind}: {said}");
        assert!(metric(&w, "captions", "loss_discriminator").iter().all(|loss| loss.is_finite()), "{kind}");
        if kind != "captions.jsonl" {
            continue;
        }
        // Going on finds both, and refuses what another autoencoder or other captions made.
        let said = stderr(&w.run(&format!("{line} --steps 3")));
        assert!(said.contains("12 latents in captions/latents (0 made now)"), "{said}");
        w.ok(&format!("{} --recipe dmd2 --data captioned --prompts prompts.txt --steps 1", SHORT));
        w.edit_json("teacher/vae/config.json", |config| config["scaling_factor"] = json!(0.5));
        let other = stderr(&w.run(&format!("{line} --steps 4")));
        assert!(other.contains("captions/latents: holds latents of other autoencoders"), "{other}");
        w.write(
            "captioned/captions.jsonl",
            "{\"file\": \"noto/1.png\", \"captions\": [\"hat\"]}\n{\"file\": \"2.png\", \"text\": \"hat\"}\n",
        );
        w.refuses(
            &format!("{line} --steps 4"),
            1,
            &["captions name 1 pictures that are not there; the first is 2.png"],
        );
        w.write("captioned/captions.jsonl", "{\"file\": \"noto/1.png\"}\n");
        w.refuses(&format!("{line} --steps 4"), 1, &["captions.jsonl", "line 1: expected a picture"]);
    }
    let (w, _) = with_latent_teacher("sd");
    write_captioned(&w, "none");
    let line = "distill --teacher teacher --recipe dmd2 --data captioned --out run";
    w.refuses(line, 1, &["no picture has a caption; expected captions.jsonl, metadata.jsonl, metadata.csv"]);
}

#[test]
fn recipes_of_text_begin_as_they_are() {
    let (w, _) = with_latent_teacher("sd");
    write_captioned(&w, ".txt");
    for (recipe, given) in [
        ("sd15", "--prompts prompts.txt"),
        ("sd15-lsg", "--prompts prompts.txt"),
        ("sdxl-4step", "--data captioned"),
        ("text-small", "--prompts prompts.txt"),
    ] {
        let line = format!("distill --teacher teacher --recipe {recipe} {given} --out {recipe}");
        w.ok(&format!("{line} --steps 2 --batch 2 --set ratio=2"));
    }
}

/// States read from shards, whatever the number of prompts, are those that the encoders make.
#[test]
fn text_states_are_kept_and_known_again() {
    let w = with_pipeline("sdxl");
    let teacher = dmd_models::ModelFolder::load(&w.path("teacher"), &Device::Cpu).unwrap();
    let texts: Vec<String> = (0..300).map(|i| format!("a photo of {i} cats")).collect();
    let read_by = |texts: &[String], encoder: &str| {
        let encoders = teacher.text(&Device::Cpu, 2).unwrap().unwrap();
        dmd::prompts::Prompts::new(texts.to_vec(), encoders, encoder.into(), "", 5.0).unwrap()
    };
    let prompts = |texts: &[String]| read_by(texts, "encoder");
    let (made, mut kept) = (prompts(&texts), prompts(&texts));
    let folder = w.path("text");
    // Too many to keep are made as they are asked for.
    kept.keep(&folder, 300 * 4 * 100).unwrap();
    assert!(!folder.exists());
    kept.keep(&folder, u64::MAX).unwrap();
    let picks = [299, 0, 255, 256, 0];
    let [made, kept] = [made, kept].map(|prompts| prompts.told(&picks, &Device::Cpu).unwrap());
    assert_eq!(kept.iter().map(|(way, _)| way).collect::<Vec<_>>(), [dmd_models::Way::Text, dmd_models::Way::Vector]);
    for (way, kept) in kept.iter() {
        let gap = (kept - made.get(way).unwrap()).unwrap().abs().unwrap().max_all().unwrap();
        let gap: f32 = gap.to_scalar().unwrap();
        assert!(kept.dim(0).unwrap() == 5 && gap < 1e-5, "{way:?}: {gap}");
    }
    let before = w.snapshot("text");
    prompts(&texts).keep(&folder, u64::MAX).unwrap();
    assert!(w.snapshot("text") == before);
    let refused =
        |texts: &[String], encoder: &str| read_by(texts, encoder).keep(&folder, u64::MAX).unwrap_err().to_string();
    let of_other = refused(&texts, "other");
    assert!(of_other.contains("holds text states of other text encoders or tokenizers"), "{of_other}");
    assert!(refused(&texts[1..], "encoder").contains("of other prompts"));
}

#[test]
fn prompts_that_cannot_be_used_are_refused_and_long_ones_cut() {
    let (w, told) = with_latent_teacher("sd");
    w.refuses("distill --teacher teacher --out run", 2, &["the teacher is told text: give --prompts FILE"]);
    for (file, bytes, said) in [
        ("empty.txt", &b"\n\n"[..], "holds no prompt, expected one a line"),
        ("latin.txt", b"hat\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("nul.txt", b"hat\nc\0a\0t\0\n", "line 2 holds a NUL"),
    ] {
        w.write(file, bytes);
        w.refuses(&format!("distill --teacher teacher --out run --prompts {file}"), 1, &[file, said]);
    }
    w.refuses("distill --teacher teacher --out run --prompts none.txt", 1, &["none.txt"]);
    w.refuses(&format!("{SHORT} --prompts prompts.txt --negative hat"), 2, &["guides away from nothing"]);
    w.write("prompts.txt", format!("hello\n{}\n", "a photo of a cat ".repeat(20)));
    let said = stderr(&w.run(&format!("{SHORT} {told} --steps 1")));
    assert!(said.contains("1 of 2 prompts have more than the 22 tokens that the text encoder reads"), "{said}");
    assert_eq!(said.matches("is left out: \"of a cat a photo").count(), 1, "{said}");
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.write("prompts.txt", FOUR);
    w.refuses("distill --teacher teacher --out run --prompts prompts.txt", 2, &["the teacher is told no text"]);
    w.refuses("distill --teacher teacher --out run --negative hat --guidance 2", 1, &["no classes to be guided by"]);
}

#[test]
fn options_without_effect_are_refused() {
    let w = with_pipeline("sd");
    w.refuses("sample teacher --npy a.npy", 2, &["this model is told text: give --prompt TEXT or --prompts FILE"]);
    w.write("empty.txt", "\n");
    w.refuses("sample teacher --prompts empty.txt --npy a.npy", 1, &["holds no prompt"]);
    w.write("latin.txt", b"caf\xe9\n");
    w.refuses("sample teacher --prompts latin.txt --npy a.npy", 1, &["line 1 is not UTF-8"]);
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.refuses("sample teacher --prompt cat --npy a.npy", 2, &["--prompt", "takes no text"]);
    w.refuses("sample teacher --negative cat --npy a.npy", 2, &["--negative", "teachers of text"]);
    w.refuses("sample teacher --latents a.npy", 2, &["--latents", "not latents"]);
}

/// A file as such models are shared, and the same folder again: of both kinds of text encoder. diffusers 0.42.1 reads the
/// same tensors from these files (`from_single_file` of network and decoder, `convert_ldm_clip_checkpoint` and
/// `convert_open_clip_checkpoint` of text encoders: 208 + 124 + 36 and 292 + 124 + 36 + 37 tensors, no difference).
#[test]
fn a_folder_in_one_file_is_the_same_folder_again() {
    for (name, family) in [("sd", "Stable Diffusion 1"), ("sdxl", "Stable Diffusion XL")] {
        let w = with_pipeline(name);
        assert_eq!(w.ok("convert teacher one.safetensors")["family"], json!(family));
        let result = w.ok("convert one.safetensors again --like teacher");
        assert_eq!((&result["family"], &result["prediction"]), (&json!(family), &json!("epsilon")));
        for part in ["unet", "vae", "text_encoder", "text_encoder_2"] {
            let path = |folder: &str| w.path(&format!("{folder}/{part}"));
            if !path("teacher").exists() {
                continue;
            }
            let file = if part.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
            let load = |folder: &str| {
                let weights = Weights::load(&path(folder).join(format!("{file}.safetensors")), &Device::Cpu).unwrap();
                let plain = |name: &str| name.trim_start_matches("text_model.").to_string();
                let bytes = |tensor: &candle_core::Tensor| {
                    assert!(tensor.dtype().is_float());
                    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
                };
                let tensors = weights.iter().map(|(name, t)| (plain(name), (t.dims().to_vec(), t.dtype(), bytes(t))));
                tensors.collect::<BTreeMap<_, _>>()
            };
            assert_eq!(load("again"), load("teacher"), "{name} {part}");
        }
        let of = |folder: &str| {
            let output = w.command(&format!("sample {folder} {STEPS}")).args(CAT).output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            w.npy("pictures.npy")
        };
        assert_eq!(of("again"), of("teacher"), "{name}");
        w.refuses("convert one.safetensors again --like teacher", 1, &["again: exists already", "--force"]);
        w.ok("convert one.safetensors again --like teacher --force");
    }
}

#[test]
fn files_that_are_no_whole_model_say_what_is_missing() {
    let w = with_pipeline("sd");
    w.ok("convert teacher one.safetensors");
    w.refuses("sample one.safetensors --prompt a --npy a.npy", 1, &["dmd convert", "one.safetensors FOLDER"]);
    w.refuses("convert teacher one", 1, &["a name that ends in .safetensors"]);
    w.refuses("convert teacher two.safetensors --prediction epsilon", 2, &["--prediction"]);
    std::fs::create_dir(w.path("mine")).unwrap();
    w.write("mine/a.txt", "a");
    w.refuses("convert one.safetensors mine --force", 1, &["mine: is no model folder"]);
    assert!(w.path("mine/a.txt").exists());
    let whole = Weights::load(&w.path("one.safetensors"), &Device::Cpu).unwrap();
    let keep = |name: &str, keep: &dyn Fn(&str) -> Option<String>| {
        let mut kept = Weights::default();
        for (name, tensor) in whole.iter() {
            if let Some(name) = keep(name) {
                kept.insert(name, tensor.clone());
            }
        }
        kept.save(&w.path(name), &BTreeMap::new()).unwrap();
    };
    let without = |prefix: &'static str| move |name: &str| (!name.starts_with(prefix)).then(|| name.to_string());
    keep("bare.safetensors", &without("first_stage_model."));
    w.refuses("convert bare.safetensors a", 1, &["bare.safetensors", "has no autoencoder", "--like FOLDER"]);
    w.ok("convert bare.safetensors a --like teacher");
    keep("mute.safetensors", &without("cond_stage_model."));
    w.refuses("convert mute.safetensors b", 1, &["mute.safetensors", "has no text encoder"]);
    keep("blind.safetensors", &without("model.diffusion_model."));
    w.refuses("convert blind.safetensors b", 1, &["blind.safetensors", "is no whole model in one file"]);
    keep("short.safetensors", &without("model.diffusion_model.middle_block.0.in_layers.2.weight"));
    w.refuses("convert short.safetensors b --like teacher", 1, &["mid_block.resnets.0.conv1.weight"]);
    keep("odd.safetensors", &|name| Some(name.replace("middle_block.2", "middle_block.3")));
    w.refuses("convert odd.safetensors b --like teacher", 1, &["middle_block.3", "of another architecture"]);
    assert!(!w.path("b").exists() && !w.path("b.partial").exists());
}

const SMALL_KL: &str = r#"{"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;
const SMALL_TINY: &str = r#"{"_class_name": "AutoencoderTiny", "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}"#;

/// Pictures come back better than a grey one would, latents have unit spread, and a run that was taken up again ends with
/// the same weights as one that was not.
#[test]
fn autoencoders_are_trained_from_pictures() {
    let w = Workplace::new().with_pictures();
    w.write("kl.json", SMALL_KL);
    w.write("tiny.json", SMALL_TINY);
    w.write("steady.toml", "decay = \"constant\"\nwarmup = 0\ncheckpoint_every = 100\nema = 0.5\n");
    for kind in ["kl", "tiny"] {
        let train = |out: &str, steps: u32| {
            let line = format!(
                "autoencoder train --data pictures --out {out} --kind {kind} --network {kind}.json --size 8 --batch 4 --rate 0.005 --config steady.toml --steps {steps}"
            );
            w.ok(&line)
        };
        let whole = train(kind, 150);
        assert_eq!(whole["latents"], json!([4, 4, 4]), "{kind}");
        let autoencoder = dmd_models::Autoencoder::load(&w.path(kind), &Device::Cpu).unwrap();
        let options =
            dmd::data::DataOptions { size: [8, 8], grey: false, unconditional: true, captions: false, strict: true };
        let pictures = dmd::data::load(&w.path("pictures"), &options, |_, _| ()).unwrap();
        let all: Vec<usize> = (0..pictures.len()).collect();
        let (pixels, _) = pictures.batch(&all, &vec![false; all.len()]);
        let pictures = candle_core::Tensor::from_vec(pixels, (all.len(), 3, 8, 8), &Device::Cpu).unwrap();
        let latents = autoencoder.encode(&pictures).unwrap().mean;
        let number = |x: candle_core::Tensor| x.mean_all().unwrap().to_scalar::<f32>().unwrap();
        let remade = autoencoder.decode(&latents).unwrap();
        let error = number((&remade - &pictures).unwrap().abs().unwrap());
        let grey = number((&pictures - f64::from(number(pictures.clone()))).unwrap().abs().unwrap());
        assert!(error < 0.5 * grey, "{kind}: {error}, a grey picture {grey}");
        let spread = number((&latents - f64::from(number(latents.clone()))).unwrap().sqr().unwrap()).sqrt();
        assert!((0.7..1.2).contains(&spread), "{kind}: {spread}");

        train("parts", 2);
        train("parts", 4);
        train("straight", 4);
        let weights =
            |out: &str| std::fs::read(w.path(&format!("{out}/training/checkpoints/step-00000004/weights.safetensors")));
        assert_eq!(weights("parts").unwrap(), weights("straight").unwrap(), "{kind}");
        ["parts", "straight"].iter().for_each(|out| std::fs::remove_dir_all(w.path(out)).unwrap());
    }
}

#[test]
fn an_autoencoder_that_cannot_be_trained_says_why() {
    let w = Workplace::new().with_pictures();
    w.write("kl.json", SMALL_KL);
    w.write("wide.json", SMALL_KL.replace("\"norm_num_groups\": 4", "\"norm_num_groups\": 3"));
    let train = |more: &str| format!("autoencoder train --data pictures --out a --size 8 --steps 1 --batch 2 {more}");
    w.refuses(&train("--network kl.json").replace("--size 8", "--size 9"), 1, &["size is 9×9", "multiples of 2"]);
    w.refuses(&train("--network kl.json --kind tiny"), 1, &["kl.json", "AutoencoderKL", "expected AutoencoderTiny"]);
    w.refuses(&train("--network wide.json"), 1, &["wide.json", "norm_num_groups"]);
    w.refuses(&train("--perceptual none.onnx"), 1, &["none.onnx"]);
    w.write("bad.toml", "kl = -1.0\n");
    w.refuses(&train("--config bad.toml"), 2, &["kl is -1"]);
    w.write("idle.toml", "perceptual_weight = 2.0\n");
    w.refuses(&train("--config idle.toml"), 2, &["perceptual_weight is 2"]);
    w.ok(&train("--network kl.json"));
    std::fs::remove_file(w.path("pictures/red/23.png")).unwrap();
    w.fails(&train("--network kl.json").replace("--steps 1", "--steps 2"), 1, &["other pictures"]);
}

/// A model of text as files: prompts free, of a list, or one; each folder proven from prompts to pixels before it is there.
#[test]
fn a_model_of_text_is_exported_as_a_folder_of_its_parts() {
    let w = with_pipeline("sd");
    let export = "export teacher --as-generator --timestep 999 --engine tract";
    let report = w.ok(&format!("{export} --onnx free --output u8"));
    assert_eq!(report["engines"][0]["status"]["result"], "passed", "{report}");
    assert_eq!(report["parts"].as_array().unwrap().len(), 3);
    let info = FolderInfo::read(w.path("free")).unwrap();
    assert_eq!(
        info.parts.iter().map(|part| part.file.as_str()).collect::<Vec<_>>(),
        ["text_encoder.onnx", "generator.onnx", "decoder.onnx"]
    );
    w.write("prompts.txt", "a photo of a cat\na photo of a hat\n");
    let tiny = "encoders/autoencoders/tiny";
    let w = w.with_fixture_at(tiny, "taesd");
    w.ok(&format!("{export} --onnx listed/ --prompts prompts.txt --decoder taesd"));
    let info = FolderInfo::read(w.path("listed")).unwrap();
    assert!(info.part("text_encoder").is_none() && info.prompts.is_empty(), "{info:?}");
    let generator = ModuleInfo::read(w.path("listed/generator.onnx")).unwrap();
    assert_eq!(generator.classes, ["a photo of a cat", "a photo of a hat"]);
    let output = w.command(&format!("{export} --onnx one --fixed-prompt")).arg("a photo of a cat").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let generator = ModuleInfo::read(w.path("one/generator.onnx")).unwrap();
    assert_eq!((generator.fixed_class.as_deref(), generator.inputs.len()), (Some("a photo of a cat"), 1));

    w.refuses(&format!("{export} --onnx free"), 1, &["free: exists already"]);
    w.refuses(&format!("{export} --onnx a.onnx"), 1, &["is told text", "--onnx DIR"]);
    w.refuses(&format!("{export} --onnx a --report"), 2, &["--report has no effect"]);
    w.write("twice.txt", "a cat\na hat\na cat\n");
    w.refuses(&format!("{export} --onnx a --prompts twice.txt"), 1, &["\"a cat\" is there twice"]);
    let late = export.replace("999", "1000");
    w.refuses(&format!("{late} --onnx a"), 1, &["--timestep is 1000, expected 0 to 999"]);
    let w = w.with_fixture_at("encoders/autoencoders/shifted", "wide");
    let refusal = ["--decoder wide: it takes latents of 6 channels, the network makes 4"];
    w.refuses(&format!("{export} --onnx a --decoder wide"), 1, &refusal);
    let w = Workplace::new().with_fixture("ddpm-tiny");
    let plain = "export teacher --as-generator --sigma 2.5 --onnx a.onnx";
    w.refuses(&format!("{plain} --fixed-prompt cat"), 2, &["--fixed-prompt", "told no text"]);
    w.refuses(&format!("{plain} --decoder teacher"), 2, &["--decoder", "one file is written"]);
}

/// 24 pictures with two captions each, and a decoder for them in `vae`.
fn with_captions() -> Workplace {
    let w = Workplace::new().with_pictures();
    let line = |i: u32| {
        let class = if i < 12 { "blue" } else { "red" };
        json!({"file": format!("{class}/{i}.png"), "captions": [format!("a {class} square"), format!("{class}, number {i}")]})
    };
    w.write("pictures/captions.jsonl", (0..24).map(|i| format!("{}\n", line(i))).collect::<String>());
    w.write("kl.json", SMALL_KL);
    w.write(
        "text.json",
        r#"{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 12}"#,
    );
    w.write("unet.json", r#"{"_class_name": "UNet2DConditionModel", "block_out_channels": [8, 8], "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2}"#);
    w.ok("autoencoder train --data pictures --out vae --network kl.json --size 8 --steps 30 --batch 4 --rate 0.005");
    w
}

const TEACH: &str = "teacher train --data pictures --text --size 8 --batch 4 --unet unet.json --text-encoder text.json --vocabulary 540";

/// From pictures with captions to a generator that takes prompts, with nothing from elsewhere: the vocabulary, the text
/// encoder, the decoder and the network are learned here. A run that was taken up again ends with the same weights.
/// diffusers 0.42.1 opens such a folder as it is (`StableDiffusionPipeline`): ten Euler steps with guidance 3 of the same noise
/// end within 8.7e-5 of ours, where the largest latent is 1.11.
#[test]
fn a_teacher_of_text_is_trained_from_captions() {
    let w = with_captions();
    w.write("steady.toml", "decay = \"constant\"\nlabel_dropout = 0.1\nema = 0.5\n");
    let train = |out: &str, steps: u32| {
        w.ok(&format!("{TEACH} --decoder vae --config steady.toml --out {out} --steps {steps}"))
    };
    train("parts", 2);
    train("parts", 4);
    train("teacher", 4);
    let parts =
        |out: &str| ["unet", "vae", "text_encoder", "tokenizer"].map(|part| w.snapshot(&format!("{out}/{part}")));
    for (part, (found, expected)) in parts("parts").iter().zip(&parts("teacher")).enumerate() {
        assert!(found == expected, "part {part} differs");
    }
    // Gradients reach the text encoder through the network.
    let words = |step: u32| {
        let path = w.path(&format!("teacher/training/checkpoints/step-0000000{step}/weights.safetensors"));
        let weights = Weights::load(&path, &Device::Cpu).unwrap();
        let table = weights.get("text_encoder.embeddings.token_embedding.weight").unwrap();
        table.to_vec2::<f32>().unwrap()
    };
    let before = {
        w.ok(&format!("{TEACH} --decoder vae --config steady.toml --out first --steps 1"));
        let path = w.path("first/training/checkpoints/step-00000001/weights.safetensors");
        let weights = Weights::load(&path, &Device::Cpu).unwrap();
        weights.get("text_encoder.embeddings.token_embedding.weight").unwrap().to_vec2::<f32>().unwrap()
    };
    assert_ne!(words(4), before);
    let made = w.ok("sample teacher --prompt red --steps 2 -n 2 --npy a.npy --latents b.npy");
    assert_eq!(made["pictures"], json!(2));
    assert_eq!((w.npy("a.npy").dim(), w.npy("b.npy").dim()), ((2, 3, 8, 8), (2, 4, 4, 4)));
    w.write("prompts.txt", "a red square\na blue square\n");
    w.ok("distill --teacher teacher --prompts prompts.txt --out run --recipe plain --steps 1 --batch 2");
    w.ok("sample run --prompt blue -n 1 --npy c.npy");
    assert_eq!(w.npy("c.npy").dim(), (1, 3, 8, 8));
}

/// In pixels, and with a text encoder of another model, which stays as it is.
#[test]
fn a_text_encoder_may_stay_as_it_is() {
    let w = with_captions().with_fixture_at("encoders/pipelines/sd", "other");
    w.edit_json("unet.json", |unet| unet["in_channels"] = json!(3));
    w.edit_json("unet.json", |unet| unet["out_channels"] = json!(3));
    w.ok(&format!("{} --out teacher --steps 1", TEACH.replace("text.json", "other").replace(" --vocabulary 540", "")));
    for part in ["text_encoder", "tokenizer"] {
        assert!(w.snapshot(&format!("teacher/{part}")) == w.snapshot(&format!("other/{part}")));
    }
    w.ok("sample teacher --prompt cat --steps 1 -n 1 --npy a.npy");
    assert_eq!(w.npy("a.npy").dim(), (1, 3, 8, 8));
}

#[test]
fn a_teacher_of_text_that_cannot_be_trained_says_why() {
    let w = with_captions();
    let line = format!("{TEACH} --decoder vae --out t --steps 1");
    w.refuses(&line.replace("540", "100"), 1, &["vocabulary is 100"]);
    w.refuses(&line.replace(" --text ", " "), 2, &["are for teachers of text"]);
    w.refuses(&format!("{line} --flip"), 2, &["flip is true"]);
    w.refuses(&line.replace("--size 8", "--size 9"), 1, &["multiples of 2"]);
    w.refuses(&line.replace("--decoder vae", "--decoder none"), 1, &["none"]);
    w.edit_json("text.json", |text| text["hidden_size"] = json!(24));
    w.refuses(&line, 1, &["unet.json", "tokens of 24 channels"]);
    std::fs::remove_file(w.path("pictures/captions.jsonl")).unwrap();
    w.refuses(&line, 1, &["caption"]);
}
