//! Latent teachers and those of text that diffusers wrote, sampled whole: prompt to pixels. Expected pictures are of
//! `models/tests/make_encoder_fixtures.py`, ten Euler steps of diffusers 0.42.1.

mod common;
use candle_core::{DType, Device};
use common::{Workplace, stderr};
use dmd_models::Weights;
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
    w.refuses("sample v1-5.safetensors --npy a.npy", 1, &["is a whole model in one file", "from_single_file"]);
}

#[test]
fn options_without_effect_are_refused() {
    let w = with_pipeline("sd");
    w.refuses("sample teacher --npy a.npy", 2, &["this model is told text: give --prompt TEXT or --prompts FILE"]);
    w.write("empty.txt", "\n");
    w.refuses("sample teacher --prompts empty.txt --npy a.npy", 1, &["holds no prompt"]);
    w.write("latin.txt", b"caf\xe9\n");
    w.refuses("sample teacher --prompts latin.txt --npy a.npy", 1, &["line 1 is not UTF-8"]);
    w.refuses("distill --teacher teacher --out run", 1, &["the teacher: is told text"]);
    let w = Workplace::new().with_fixture("ddpm-tiny");
    w.refuses("sample teacher --prompt cat --npy a.npy", 2, &["--prompt", "takes no text"]);
    w.refuses("sample teacher --negative cat --npy a.npy", 2, &["--negative", "teachers of text"]);
    w.refuses("sample teacher --latents a.npy", 2, &["--latents", "not latents"]);
}
