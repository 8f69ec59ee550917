//! The parts of a text-to-image model as files of their own: a network that is told text, a text encoder, decoders. Each
//! is exported, which runs it by every engine present and compares it with candle.

use candle_core::{DType, Device, Tensor};
use dmd_export::{
    Batch, Decoding, Dialect, EngineChoice, Error, ExportOptions, ExportReport, ModelInfo, Module, OneStep, Output,
    Parts, Precision, Status, TextEncoding, ToldBy, export, export_folder, export_passes,
};
use dmd_models::networks::unet2d_condition::{UNet2DCondition, UNet2DConditionConfig};
use dmd_models::noise_levels::Betas;
use dmd_models::{Architecture, Condition, Denoiser, Generator, Network, NoiseLevels, Prediction, Way, Weights};
use dmd_models::{Eager, ModelFolder};
use dmd_runtime::{Feed, FolderInfo, Given, ModuleInfo, Pipeline, Request, Values};
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures")
}

/// A fixture of `dmd-models` and the two prompts' text that it was run with there.
fn told(name: &str, sigma: f64) -> (OneStep, Condition<Tensor>) {
    let folder = fixtures().join("unet2d_condition").join(name);
    let read = |file: &str| {
        let weights = Weights::load(&folder.join(file), &Device::Cpu).unwrap();
        weights.to(DType::F32, &Device::Cpu).unwrap()
    };
    let path = folder.join("config.json");
    let config = UNet2DConditionConfig::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
    let network = UNet2DCondition::new(&config, &read("diffusion_pytorch_model.safetensors")).unwrap();
    let io = read("io.safetensors");
    let ways = [(Way::Text, "text"), (Way::Vector, "vector")];
    let rows: Condition<Tensor> = ways.iter().filter_map(|(way, name)| Some((*way, io.get(name)?.clone()))).collect();
    let levels = NoiseLevels::variance_preserving(&Betas::ScaledLinear, 1000, [0.00085, 0.012], false).unwrap();
    let network = Network::UNet2DCondition(network);
    let denoiser = Denoiser { network, prediction: Prediction::Epsilon, levels, clip: None, unconditional: None };
    (OneStep { latents: true, ..OneStep::new(Generator { denoiser, sigma }, [8, 8]) }, rows)
}

/// Exports a part into a fresh folder in every dialect, and expects that tract ran it.
fn in_every_dialect<M: Module>(what: &str, part: &M, options: &ExportOptions, look: impl Fn(&Path, &ExportReport)) {
    for dialect in Dialect::ALL {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part.onnx");
        let options = ExportOptions { dialect, ..options.clone() };
        let report = match export(part, &Default::default(), &options, &path) {
            // It has no error function, and says so.
            Err(error) if dialect == Dialect::Nnapi && error.to_string().contains("--dialect portable") => continue,
            report => report.unwrap_or_else(|error| panic!("{what} {dialect}: {error}")),
        };
        println!("{what} {dialect}: {} nodes", report.nodes);
        report.engines.iter().for_each(|verdict| println!("  {verdict}"));
        let passed = |engine| report.engines.iter().any(|v| v.engine == engine && v.status == Status::Passed);
        assert!(passed("tract"), "{what} {dialect}: {report:?}");
        look(&path, &report);
    }
}

fn ports(path: &Path) -> (Vec<String>, Vec<String>) {
    let info = ModuleInfo::read(path).unwrap();
    let say = |ports: Vec<dmd_runtime::Port>| {
        ports.iter().map(|port| format!("{} {} {:?}", port.name, port.kind, port.shape)).collect()
    };
    (say(info.inputs), say(info.outputs))
}

#[test]
fn a_network_that_is_told_text_is_a_file_with_text_as_an_input() {
    for (name, numbers) in [("sd15", 0), ("sdxl", 6), ("lcm", 1)] {
        let (step, examples) = told(name, 2.5);
        let [width, tokens] = [2, 1].map(|axis| examples.get(Way::Text).unwrap().dims()[axis]);
        let pooled = examples.get(Way::Vector).map_or(0, |rows| rows.dims()[1] - numbers);
        let step = OneStep { told: ToldBy::Text { examples: first_numbers(&examples, numbers), numbers }, ..step };
        in_every_dialect(name, &step, &ExportOptions::default(), |path, _| {
            let (inputs, outputs) = ports(path);
            let mut expected = vec![
                "noise f32 [Some(1), Some(4), Some(8), Some(8)]".to_string(),
                format!("text f32 [Some(1), Some({tokens}), Some({width})]"),
            ];
            expected.extend((pooled > 0).then(|| format!("vector f32 [Some(1), Some({pooled})]")));
            assert_eq!(inputs, expected, "{name}");
            assert_eq!(outputs, ["latents f32 [Some(1), Some(4), Some(8), Some(8)]"], "{name}");
            let graph = dmd_export::lint::read(path).unwrap().graph.unwrap();
            let forbidden = ["Sin", "Cos", "Gemm", "Shape", "Expand"];
            assert!(!graph.node.iter().any(|node| forbidden.contains(&node.op_type.as_str())), "{name}");
        });
    }
}

/// The rows with the first one's numbers: those of a file are the same for all prompts.
fn first_numbers(rows: &Condition<Tensor>, numbers: usize) -> Condition<Tensor> {
    let ways = rows.iter().map(|(way, rows)| {
        if way != Way::Vector || numbers == 0 {
            return (way, rows.clone());
        }
        let (n, width) = rows.dims2().unwrap();
        let same = rows.narrow(1, width - numbers, numbers).unwrap().narrow(0, 0, 1).unwrap();
        let same = same.broadcast_as((n, numbers)).unwrap();
        (way, Tensor::cat(&[rows.narrow(1, 0, width - numbers).unwrap(), same.contiguous().unwrap()], 1).unwrap())
    });
    ways.collect()
}

fn pipeline(name: &str) -> ModelFolder {
    ModelFolder::load(&fixtures().join("encoders/pipelines").join(name), &Device::Cpu).unwrap()
}

const PROMPTS: [&str; 3] = ["a photo of a cat", "the number 7, of a dog", ""];

/// The text of prompts, by the file, is what the network is told of them. Two encoders of SDXL read ids of their own.
#[test]
fn a_text_encoder_is_a_file_of_ids() {
    for (name, n_encoders) in [("sd", 1), ("sdxl", 2)] {
        let pipeline = pipeline(name).pipeline(&Device::Cpu).unwrap();
        let encoders = pipeline.text.clone().unwrap();
        let part = TextEncoding { encoders: encoders.clone(), prompts: PROMPTS.map(String::from).into() };
        let ids = encoders.ids(&PROMPTS).unwrap();
        in_every_dialect(name, &part, &ExportOptions { batch: Batch::Fixed(3), ..Default::default() }, |path, _| {
            let (inputs, outputs) = ports(path);
            let expected = ["ids i32 [Some(3), Some(24)]", "ids_2 i32 [Some(3), Some(24)]"];
            assert_eq!(inputs, expected[..n_encoders], "{name}");
            let vector = "vector f32 [Some(3), Some(12)]".to_string();
            assert_eq!(outputs.get(1), (n_encoders == 2).then_some(&vector), "{name}");
            let feeds: Vec<Vec<i32>> = ids
                .iter()
                .map(|ids| ids.flatten_all().unwrap().to_vec1::<i64>().unwrap().iter().map(|id| *id as i32).collect())
                .collect();
            let names = ["ids", "ids_2"];
            let feeds: Vec<Feed> = names
                .iter()
                .zip(&feeds)
                .map(|(name, ids)| Feed { name, shape: &[3, 24], values: Values::I32(ids) })
                .collect();
            let found = dmd_runtime::Module::load(path, Default::default()).unwrap().run(&feeds).unwrap();
            let told = encoders.encode(&PROMPTS).unwrap();
            let vector = told.get(Way::Vector).map(|rows| rows.narrow(1, 0, 12).unwrap());
            let expected = [told.get(Way::Text).cloned(), vector];
            for (found, expected) in found.iter().zip(expected.into_iter().flatten()) {
                let Given::F32(found) = found else { panic!("floats") };
                let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
                assert_close(found, &expected, 1e-4);
            }
        });
    }
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let gap = found.iter().zip(expected).fold(0f32, |gap, (a, b)| gap.max((a - b).abs()));
    assert!(found.len() == expected.len() && gap <= tolerance * largest, "{gap} of {largest}");
}

/// Without an end the first token is taken, as transformers does; two ends count once.
#[test]
fn pooled_text_is_of_the_first_end_or_of_the_first_token() {
    let encoders = pipeline("sdxl").pipeline(&Device::Cpu).unwrap().text.unwrap();
    let end = i64::from(encoders.encoders[1].tokenizer().end());
    let part = TextEncoding { encoders: encoders.clone(), prompts: vec!["a cat".into()] };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.onnx");
    export(&part, &Default::default(), &Default::default(), &path).unwrap();
    let module = dmd_runtime::Module::load(&path, Default::default()).unwrap();
    for ends in [vec![5, 9], vec![23], vec![0], vec![]] {
        let ids: Vec<i64> = (0..24).map(|at| if ends.contains(&at) { end } else { 3 + at as i64 }).collect();
        let narrow: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        let feed = |name| Feed { name, shape: &[1, 24], values: Values::I32(&narrow) };
        let Given::F32(found) = &module.run(&[feed("ids"), feed("ids_2")]).unwrap()[1] else { panic!("floats") };
        let ids = Tensor::from_vec(ids, (1, 24), &Device::Cpu).unwrap();
        let (_, pooled) = encoders.run(&Eager, &[ids.clone(), ids]).unwrap();
        assert_close(found, &pooled.unwrap().flatten_all().unwrap().to_vec1().unwrap(), 1e-4);
    }
}

#[test]
fn decoders_are_files_of_latents_with_their_scaling_in_the_first_convolution() {
    for (name, picture) in [("kl", 16), ("shifted", 16), ("tiny", 16)] {
        let folder = fixtures().join("encoders/autoencoders").join(name);
        let autoencoder = dmd_models::Autoencoder::load(&folder, &Device::Cpu).unwrap();
        let sides = picture / autoencoder.factor();
        let part = Decoding { autoencoder: autoencoder.clone(), size: [sides, sides] };
        in_every_dialect(name, &part, &ExportOptions::default(), |path, report| {
            let (inputs, outputs) = ports(path);
            let channels = autoencoder.latent_channels();
            assert_eq!(inputs, [format!("latents f32 [Some(1), Some({channels}), Some({sides}), Some({sides})]")]);
            let colours = autoencoder.picture_channels();
            assert_eq!(outputs, [format!("image f32 [Some(1), Some({colours}), Some({picture}), Some({picture})]")]);
            println!("{:?}", report.folded);
            if name != "tiny" {
                let graph = dmd_export::lint::read(path).unwrap().graph.unwrap();
                assert_ne!(graph.node[0].op_type, "Mul", "{name}: the factor is a node of its own");
            }
        });
        let u8 = ExportOptions { output: Output::U8, ..Default::default() };
        in_every_dialect(name, &part, &u8, |path, _| {
            let colours = autoencoder.picture_channels();
            assert_eq!(
                ports(path).1,
                [format!("image u8 [Some(1), Some({picture}), Some({picture}), Some({colours})]")]
            );
        });
    }
}

/// Every precision that holds for generators holds for their parts, where the numbers allow it.
#[test]
fn parts_are_exported_in_other_precisions() {
    let (step, examples) = told("sd15", 2.5);
    let step = OneStep { told: ToldBy::Text { examples, numbers: 0 }, ..step };
    let encoders = pipeline("sdxl").pipeline(&Device::Cpu).unwrap().text.unwrap();
    let text = TextEncoding { encoders, prompts: PROMPTS.map(String::from).into() };
    let folder = fixtures().join("encoders/autoencoders/kl");
    let autoencoder = dmd_models::Autoencoder::load(&folder, &Device::Cpu).unwrap();
    let decoder = Decoding { autoencoder, size: [4, 4] };
    for (precision, least) in [(Precision::Fp16, 40.0), (Precision::W8, 20.0)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("part.onnx");
        let options = ExportOptions { precision, min_psnr_db: Some(least), force: true, ..Default::default() };
        let size = |report: ExportReport| {
            report.engines.iter().for_each(|verdict| println!("{precision} {verdict}"));
            assert!(report.engines.iter().any(|v| v.engine == "tract" && v.status == Status::Passed), "{report:?}");
            report.bytes
        };
        let sizes = [
            size(export(&step, &Default::default(), &options, &path).unwrap()),
            size(export(&text, &Default::default(), &options, &path).unwrap()),
            size(export(&decoder, &Default::default(), &options, &path).unwrap()),
        ];
        println!("{precision}: {sizes:?} bytes");
        // Of the text encoder's weights, most are its table of tokens.
        assert!(precision != Precision::W8 || sizes[1] < 80_000, "{sizes:?}");
    }
}

#[test]
fn what_is_no_picture_is_not_given_as_bytes() {
    let encoders = pipeline("sd").pipeline(&Device::Cpu).unwrap().text.unwrap();
    let text = TextEncoding { encoders, prompts: vec!["a cat".into()] };
    let folder = tempfile::tempdir().unwrap();
    let options = ExportOptions { output: Output::U8, ..Default::default() };
    let error = export(&text, &Default::default(), &options, &folder.path().join("a.onnx")).unwrap_err();
    assert!(matches!(&error, Error::Setting(_)) && error.to_string().contains("u8 is for pictures"), "{error}");
}

/// A network and the two prompts of its fixture, as rows of the file.
fn one_of_two(name: &str, sigma: f64) -> OneStep {
    let (step, rows) = told(name, sigma);
    OneStep { told: ToldBy::OneOf(rows), ..step }
}

fn two_prompts() -> ModelInfo {
    ModelInfo { classes: ["a kite", "a goldfish"].map(String::from).to_vec(), weights_sha256: "0".repeat(64) }
}

/// The rows by hand, beside the exporter's own check of every label.
#[test]
fn prompts_are_in_the_file_and_chosen_by_label() {
    for name in ["sd15", "sdxl"] {
        let step = one_of_two(name, 2.5);
        let ToldBy::OneOf(rows) = step.told.clone() else { panic!("rows") };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.onnx");
        export(&step, &two_prompts(), &Default::default(), &path).unwrap();
        let file = dmd_runtime::Module::load(&path, Default::default()).unwrap();
        assert_eq!(file.info().classes, ["a kite", "a goldfish"]);
        let graph = dmd_export::lint::read(&path).unwrap().graph.unwrap();
        let gathers = graph.node.iter().filter(|node| node.op_type == "Gather").count();
        assert_eq!((gathers, graph.input.len()), (1, 2), "{name}");
        let noise = dmd_runtime::picture_noise(7, 0, 1, [4, 8, 8]);
        let values = noise.as_slice().unwrap();
        let noise_here = Tensor::from_vec(values.to_vec(), (1, 4, 8, 8), &Device::Cpu).unwrap();
        let by_label = [0i64, 1].map(|label| {
            let noise = Feed { name: "noise", shape: &[1, 4, 8, 8], values: Values::F32(values) };
            let label_feed = Feed { name: "label", shape: &[1], values: Values::I64(&[label]) };
            let Given::F32(found) = file.run(&[noise, label_feed]).unwrap().remove(0) else { panic!("floats") };
            let cond = rows.try_map(|rows| rows.narrow(0, label as usize, 1)).unwrap();
            let expected = step.generator.generate(&Eager, &noise_here, &cond).unwrap();
            assert_close(&found, &expected.flatten_all().unwrap().to_vec1().unwrap(), 1e-4);
            found
        });
        assert_ne!(by_label[0], by_label[1]);
    }
}

#[test]
fn one_prompt_leaves_no_input_and_several_passes_share_the_list() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.onnx");
    let options = ExportOptions { fixed_label: Some(1), ..ExportOptions::default() };
    export(&one_of_two("sd15", 2.5), &two_prompts(), &options, &path).unwrap();
    let found = ModuleInfo::read(&path).unwrap();
    assert_eq!((found.fixed_class.as_deref(), found.classes.len(), found.inputs.len()), (Some("a goldfish"), 0, 1));
    let path = folder.path().join("passes.onnx");
    let passes = [one_of_two("sd15", 10.0), one_of_two("sd15", 1.0)];
    export_passes(&passes, &two_prompts(), &ExportOptions::default(), &path).unwrap();
    let found = ModuleInfo::read(&path).unwrap();
    assert_eq!((found.sigmas.as_slice(), found.inputs[1].name.as_str()), (&[10.0, 1.0][..], "row"));
}

/// The parts of a fixture's pipeline, its network held at some noise levels as if it were a generator.
fn parts(name: &str, sigmas: &[f64]) -> Parts {
    let folder = pipeline(name);
    let pipeline = folder.pipeline(&Device::Cpu).unwrap();
    let [_, height, width] = folder.sample_shape().unwrap();
    let encoders = pipeline.text.clone().unwrap();
    let told = ToldBy::Text { examples: encoders.encode(&PROMPTS).unwrap(), numbers: encoders.n_numbers() };
    let step = |sigma: &f64| OneStep {
        told: told.clone(),
        latents: true,
        ..OneStep::new(Generator { denoiser: pipeline.denoiser.clone(), sigma: *sigma }, [height, width])
    };
    Parts {
        passes: sigmas.iter().map(step).collect(),
        rows: vec![],
        text: Some(TextEncoding { encoders, prompts: PROMPTS.map(String::from).into() }),
        decoder: pipeline.decoder.map(|autoencoder| Decoding { autoencoder, size: [height, width] }),
        weights_sha256: ["a", "b", "c"].map(String::from),
        data: Some("drawn by hand, CC0".into()),
    }
}

#[test]
fn a_text_model_is_a_folder_proven_from_prompts_to_pixels() {
    let target = tempfile::tempdir().unwrap();
    for (name, sigmas, output, kind) in
        [("sd", &[14.0][..], Output::U8, "u8"), ("sdxl", &[14.0, 2.0], Output::F32, "f32")]
    {
        let path = target.path().join(name);
        let options = ExportOptions { output, ..Default::default() };
        let report = export_folder(&parts(name, sigmas), &options, &path).unwrap();
        report.engines.iter().for_each(|verdict| println!("{name}, prompt to pixels: {verdict}"));
        assert!(report.engines.iter().any(|v| v.engine == "tract" && v.status == Status::Passed), "{report:?}");
        let info = FolderInfo::read(&path).unwrap();
        let names: Vec<&str> = info.parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names, ["text_encoder", "generator", "decoder"]);
        assert_eq!(info.data.as_deref(), Some("drawn by hand, CC0"));
        assert_eq!(info.prompts.len(), if name == "sd" { 1 } else { 2 });
        assert_eq!((info.prompts[0].tokens, info.prompts[0].tokenizer.as_str()), (24, "tokenizer.json"));
        let mut files: Vec<String> =
            std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        let mut expected = vec!["decoder.onnx", "generator.onnx", "model.json", "text_encoder.onnx", "tokenizer.json"];
        expected.extend((name == "sdxl").then_some("tokenizer_2.json"));
        assert_eq!(files, expected);
        assert_eq!(ports(&path.join("decoder.onnx")).1[0].split(' ').nth(1), Some(kind));
    }
    assert_eq!(std::fs::read_dir(target.path()).unwrap().count(), 2, "something was left beside the folders");
}

#[test]
fn a_folder_is_there_whole_or_not_at_all_and_parts_of_others_are_told_apart() {
    let target = tempfile::tempdir().unwrap();
    let path = target.path().join("model");
    let entries = || std::fs::read_dir(target.path()).unwrap().count();
    // The last part fails: no engine gives candle's pictures bit by bit.
    let strict = ExportOptions { tolerance: 1e-12, engines: EngineChoice::Tract, ..Default::default() };
    let error = export_folder(&parts("sd", &[14.0]), &strict, &path).unwrap_err();
    assert!(error.to_string().starts_with("text_encoder: the exported file failed its check"), "{error}");
    assert_eq!(entries(), 0);
    let options = ExportOptions { engines: EngineChoice::Tract, ..Default::default() };
    export_folder(&parts("sd", &[14.0]), &options, &path).unwrap();
    let error = export_folder(&parts("sd", &[14.0]), &options, &path).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    let force = ExportOptions { force: true, ..options.clone() };
    let other = Parts { weights_sha256: ["a", "another", "c"].map(String::from), ..parts("sd", &[2.0]) };
    let theirs = target.path().join("theirs");
    export_folder(&other, &force, &theirs).unwrap();
    std::fs::copy(theirs.join("generator.onnx"), path.join("generator.onnx")).unwrap();
    let error = FolderInfo::read(&path).unwrap_err().to_string();
    assert!(error.contains("is of another model: its weights have the hash \"another\""), "{error}");
    std::fs::remove_file(theirs.join("tokenizer.json")).unwrap();
    let error = FolderInfo::read(&theirs).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: is not there, and model.json names it"), "{error}");
    // A folder of something else is not replaced, whatever is asked for.
    std::fs::remove_file(theirs.join("model.json")).unwrap();
    let error = export_folder(&parts("sd", &[14.0]), &force, &theirs).unwrap_err().to_string();
    assert!(error.contains("no folder that dmd export wrote"), "{error}");
    export_folder(&parts("sd", &[14.0]), &force, &path).unwrap();
    FolderInfo::read(&path).unwrap();
    assert_eq!(entries(), 2);
}

#[test]
fn a_broken_description_of_a_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    export_folder(&parts("sd", &[14.0]), &ExportOptions { engines: EngineChoice::Tract, ..Default::default() }, &path)
        .unwrap();
    let file = path.join("model.json");
    let whole = std::fs::read_to_string(&file).unwrap();
    let swapped = whole.replace("\"text_encoder\"", "\"x\"").replace("\"decoder\"", "\"text_encoder\"");
    for (text, expected) in [
        ("{", "is no description"),
        (&whole.replace("\"format\": 1", "\"format\": 2"), "this build reads up to"),
        (&whole.replace("\"generator.onnx\"", "\"../generator.onnx\""), "expected a name within the folder"),
        (&whole.replace("\"generator\"", "\"painter\""), "the generator at least"),
        (&swapped.replace("\"x\"", "\"decoder\""), "in this order"),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = FolderInfo::read(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "expected {expected:?} in {error}");
    }
}

/// What candle makes of prompts and a seed, in [-1, 1].
fn in_candle(parts: &Parts, prompts: &[&str], seed: u64) -> Vec<f32> {
    let step = &parts.passes[0];
    let cond = match (&parts.text, &step.told) {
        (Some(text), _) => text.encoders.encode(prompts).unwrap(),
        (None, ToldBy::OneOf(rows)) => {
            let at = |prompt: &&str| parts.rows.iter().position(|row| row == prompt).unwrap() as u32;
            let at = Tensor::from_iter(prompts.iter().map(at), &Device::Cpu).unwrap();
            rows.try_map(|rows| rows.index_select(&at, 0)).unwrap()
        }
        _ => panic!("told by label"),
    };
    let [height, width] = step.size;
    let noise = dmd_runtime::picture_noise(seed, 0, prompts.len(), [4, height, width]);
    let noise = Tensor::from_vec(noise.into_raw_vec_and_offset().0, (prompts.len(), 4, height, width), &Device::Cpu);
    let mut x = step.generator.generate(&Eager, &noise.unwrap(), &cond).unwrap();
    for (pass, step) in parts.passes.iter().enumerate().skip(1) {
        let eps = dmd_runtime::noise::refining_noise(seed, pass, 0, prompts.len(), [4, height, width]);
        let eps = Tensor::from_vec(eps.into_raw_vec_and_offset().0, x.dims(), &Device::Cpu).unwrap();
        let input = ((x / step.generator.sigma).unwrap() + eps).unwrap();
        x = step.generator.generate(&Eager, &input, &cond).unwrap();
    }
    let decoder = parts.decoder.as_ref().unwrap();
    decoder.autoencoder.decode(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Prompts in, pictures out, in an app: those of candle, whatever the file's batch is, of one pass or several, of free
/// prompts or of a list.
#[test]
fn an_app_makes_candles_pictures_of_prompts() {
    let target = tempfile::tempdir().unwrap();
    for (name, sigmas, batch) in [("sd", &[14.0][..], 2), ("sdxl", &[14.0, 2.0], 1)] {
        let parts = parts(name, sigmas);
        let path = target.path().join(name);
        let options = ExportOptions { engines: EngineChoice::Tract, batch: Batch::Fixed(batch), ..Default::default() };
        export_folder(&parts, &options, &path).unwrap();
        let pipeline = Pipeline::load(&path, Default::default()).unwrap();
        let request = Request { seed: 5, batch: 3, ..Default::default() };
        let found = pipeline.generate(&PROMPTS, &request).unwrap();
        assert_close(found.as_f32().unwrap().as_slice().unwrap(), &in_candle(&parts, &PROMPTS, 5), 1e-3);
        let one = pipeline.generate(&PROMPTS[..1], &request).unwrap();
        assert_close(one.as_f32().unwrap().as_slice().unwrap(), &in_candle(&parts, &[PROMPTS[0]; 3], 5), 1e-3);
        let refused = |prompts: &[&str], expected: &str| {
            let error = pipeline.generate(prompts, &request).unwrap_err().to_string();
            assert!(error.contains(expected), "expected {expected:?} in {error}");
        };
        refused(&[], "give a prompt for each picture");
        refused(&PROMPTS[..2], "found 2 prompts, expected 1 or 3");
        std::fs::write(path.join("tokenizer.json"), "{}").unwrap();
        let error = Pipeline::load(&path, Default::default()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: is no tokenizer"), "{error}");
    }
    let free = parts("sd", &[14.0]);
    let encoders = free.text.clone().unwrap().encoders;
    let rows = encoders.encode(&PROMPTS).unwrap();
    let passes = free.passes.iter().map(|step| OneStep { told: ToldBy::OneOf(rows.clone()), ..step.clone() });
    let listed = Parts { passes: passes.collect(), rows: PROMPTS.map(String::from).into(), text: None, ..free.clone() };
    let path = target.path().join("listed");
    let options = ExportOptions { engines: EngineChoice::Tract, ..Default::default() };
    export_folder(&listed, &options, &path).unwrap();
    let pipeline = Pipeline::load(&path, Default::default()).unwrap();
    assert_eq!(pipeline.rows(), PROMPTS);
    let request = Request { seed: 5, batch: 2, ..Default::default() };
    let turned = [PROMPTS[1], PROMPTS[0]];
    let found = pipeline.generate(&turned, &request).unwrap();
    assert_eq!(found.labels(), [1, 0]);
    assert_close(found.as_f32().unwrap().as_slice().unwrap(), &in_candle(&listed, &turned, 5), 1e-3);
    let by_label = Request { labels: vec![1.into(), PROMPTS[0].into()], ..request.clone() };
    assert_eq!(pipeline.generate(&[], &by_label).unwrap(), found);
    let error = pipeline.generate(&["a dog"], &request).unwrap_err().to_string();
    assert!(error.contains("\"a dog\" is none of this model's") && error.contains(PROMPTS[0]), "{error}");
    let path = target.path().join("one");
    let fixed = ExportOptions { fixed_label: Some(0), ..options };
    export_folder(&listed, &fixed, &path).unwrap();
    let one = Pipeline::load(&path, Default::default()).unwrap();
    let error = one.generate(&["a dog"], &request).unwrap_err().to_string();
    assert!(error.contains("takes no prompts") && error.contains(PROMPTS[0]), "{error}");
    let expected = in_candle(&listed, &[PROMPTS[0]; 2], 5);
    assert_close(one.generate(&[], &request).unwrap().as_f32().unwrap().as_slice().unwrap(), &expected, 1e-3);
}
