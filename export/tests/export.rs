//! From networks to files that engines run: every network here is exported, which runs it by each engine present and
//! compares it with candle; the tests look at the files and at what is refused.

use candle_core::{DType, Device, Tensor};
use dmd_export::{
    Batch, Dialect, EngineChoice, Error, ExportOptions, ExportReport, Input, ModelInfo, Module, OneStep, Output,
    Precision, Status, export, export_passes, weights_sha256,
};
use dmd_models::layers::{Conv2d, Embedding};
use dmd_models::networks::unet2d::ClassEmbedding;
use dmd_models::{
    Activation, Architecture, Backend, Condition, Denoiser, Eager, Generator, NoiseLevels, Prediction, UNet,
    UNetConfig, Way, Weights,
};
use dmd_runtime::noise::Stream;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A UNet at one timestep, without preconditioning.
struct AtTime {
    unet: UNet,
    t: f64,
    size: [usize; 2],
}

impl Module for AtTime {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([self.unet.config().in_channels, self.size[0], self.size[1]])]
    }

    fn max_classes(&self) -> usize {
        match self.unet.config().class_embedding() {
            ClassEmbedding::None | ClassEmbedding::Identity => 0,
            ClassEmbedding::Table(n) => n,
            ClassEmbedding::Timestep => usize::MAX,
        }
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        cond: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        Ok(vec![self.unet.forward(b, &inputs[0], &[self.t], cond)?])
    }
}

fn config(json: &str) -> UNetConfig {
    UNetConfig::from_json(Path::new("config.json"), json).unwrap()
}

/// Random weights of a size that keeps every layer's share in the picture visible: none is zero.
fn random_weights(config: &UNetConfig) -> Weights {
    let mut stream = 0;
    let zero_start = UNet::init(config, &mut |_, n| vec![0.5; n]).unwrap();
    let mut draw = |t: &Tensor| {
        stream += 1;
        let values = Stream::new(1, 2, stream).normal(t.elem_count());
        let fan_in = t.dims().iter().skip(1).product::<usize>().max(4);
        Tensor::from_vec(values, t.dims(), &Device::Cpu)? * (1.0 / (fan_in as f64).sqrt())
    };
    let mut weights = Weights::default();
    for (name, tensor) in zero_start.iter() {
        let values = draw(tensor).unwrap();
        let is_norm = name.ends_with("weight") && tensor.rank() == 1;
        weights.insert(name, if is_norm { (values + 1.0).unwrap() } else { values });
    }
    weights
}

fn edm(config: &UNetConfig, weights: &Weights, sigma: f64) -> OneStep {
    let denoiser = Denoiser {
        network: dmd_models::Network::UNet2D(UNet::new(config, weights).unwrap()),
        prediction: Prediction::Edm { sigma_data: 0.5, negative: false },
        levels: NoiseLevels::karras(1000, 0.002, 80.0, 7.0).unwrap(),
        clip: None,
        unconditional: None,
    };
    OneStep::new(Generator { denoiser, sigma }, config.size().unwrap_or([8, 8]))
}

fn info(config: &UNetConfig) -> ModelInfo {
    let classes = match config.class_embedding() {
        ClassEmbedding::Timestep => ["a", "b", "c"].map(String::from).to_vec(),
        _ => vec![],
    };
    ModelInfo { classes, weights_sha256: "0".repeat(64) }
}

/// Exports into a fresh folder, expects that engines ran the file, and gives the report and the model.
fn export_and_read<M: Module>(
    what: &str,
    network: &M,
    info: &ModelInfo,
    options: &ExportOptions,
) -> (ExportReport, candle_onnx::onnx::GraphProto) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generator.onnx");
    let report = export(network, info, options, &path).unwrap_or_else(|error| panic!("{what}: {error}"));
    eprintln!("{what}: {} nodes, {} initializers", report.nodes, report.initializers);
    report.engines.iter().for_each(|verdict| eprintln!("  {verdict}"));
    assert!(report.engines.iter().any(|v| v.engine == "tract" && v.status == Status::Passed), "{what}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{what}: something was left beside the file");
    let graph = candle_onnx::read_file(&path).unwrap().graph.unwrap();
    assert_eq!(report.nodes, graph.node.len());
    (report, graph)
}

fn operators(graph: &candle_onnx::onnx::GraphProto) -> BTreeSet<&str> {
    graph.node.iter().map(|node| node.op_type.as_str()).collect()
}

const SMALL: &str = r#"{"sample_size": 8, "layers_per_block": 1, "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16, "norm_num_groups": 4, "num_class_embeds": 3}"#;

/// What is asked of random networks, which lose more than trained ones.
fn least_psnr(precision: Precision) -> Option<f64> {
    (precision != Precision::Fp32).then_some(20.0)
}

/// `SMALL` with some fields changed.
fn small(changes: &[(&str, serde_json::Value)]) -> UNetConfig {
    let mut fields: serde_json::Value = serde_json::from_str(SMALL).unwrap();
    changes.iter().for_each(|(key, value)| fields[*key] = value.clone());
    config(&fields.to_string())
}

#[test]
fn every_fixture_network_runs_from_its_file_as_in_candle() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/fixtures/unet");
    let mut folders: Vec<_> = fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    for folder in folders {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let config = config(&fs::read_to_string(folder.join("config.json")).unwrap());
        let stem = "diffusion_pytorch_model.safetensors";
        let sharded = folder.join(format!("{stem}.index.json"));
        let path = if sharded.exists() { sharded } else { folder.join(stem) };
        let weights = Weights::load(&path, &Device::Cpu).unwrap().to(DType::F32, &Device::Cpu).unwrap();
        let io = Weights::load(&folder.join("io.safetensors"), &Device::Cpu).unwrap();
        let t = io.get("timestep").unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()[0];
        let size = [2, 3].map(|axis| io.get("sample").unwrap().dims()[axis]);
        let network = AtTime { unet: UNet::new(&config, &weights).unwrap(), t, size };
        let info = ModelInfo { weights_sha256: weights_sha256(&weights).unwrap(), ..info(&config) };
        if config.in_channels != config.out_channels || config.class_embedding() == ClassEmbedding::Identity {
            let error = export(&network, &info, &ExportOptions::default(), Path::new("never.onnx")).unwrap_err();
            eprintln!("{name}: refused, {error}");
            continue;
        }
        let options = ExportOptions { batch: Batch::Fixed(2), ..Default::default() };
        let (_, graph) = export_and_read(&name, &network, &info, &options);
        let forbidden = ["Sin", "Cos", "Gemm", "Identity", "Shape", "Expand", "Pad", "Constant"];
        assert!(
            forbidden.iter().all(|operator| !operators(&graph).contains(operator)),
            "{name}: {:?}",
            operators(&graph)
        );
    }
}

#[test]
fn random_networks_of_every_kind_run_from_their_files_as_in_candle() {
    let kinds: [(&str, &[(&str, serde_json::Value)]); 10] = [
        ("plain", &[]),
        ("unconditional", &[("num_class_embeds", serde_json::Value::Null)]),
        ("scale_shift", &[("resnet_time_scale_shift", "scale_shift".into()), ("act_fn", "mish".into())]),
        (
            "scale_shift, unconditional",
            &[("resnet_time_scale_shift", "scale_shift".into()), ("num_class_embeds", serde_json::Value::Null)],
        ),
        ("resnet resampling", &[("downsample_type", "resnet".into()), ("upsample_type", "resnet".into())]),
        ("gelu, centred", &[("act_fn", "gelu".into()), ("center_input_sample", true.into())]),
        ("padding 0, scale", &[("downsample_padding", 0.into()), ("mid_block_scale_factor", 1.5.into())]),
        ("fourier", &[("time_embedding_type", "fourier".into())]),
        ("labels as timesteps", &[("class_embed_type", "timestep".into())]),
        ("two heads, no middle attention", &[("attention_head_dim", 8.into()), ("add_attention", false.into())]),
    ];
    for (name, changes) in kinds {
        let config = small(changes);
        let generator = edm(&config, &random_weights(&config), 2.5);
        for (output, batch) in [(Output::F32, 1), (Output::U8, 2)] {
            let options = ExportOptions { output, batch: Batch::Fixed(batch), ..Default::default() };
            export_and_read(&format!("{name}, {output:?}"), &generator, &info(&config), &options);
        }
    }
}

#[test]
fn every_dialect_makes_candles_pictures_and_keeps_to_its_operators() {
    let config = small(&[("act_fn", "mish".into()), ("attention_head_dim", 8.into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    for dialect in Dialect::ALL {
        let options = ExportOptions { dialect, ..Default::default() };
        let (report, graph) = export_and_read(dialect.name(), &generator, &info(&config), &options);
        let found = operators(&graph);
        let has = |operator: &str| found.contains(operator);
        assert_eq!(has("InstanceNormalization"), dialect == Dialect::Portable, "{found:?}");
        assert_eq!(has("GroupNormalization"), dialect == Dialect::Native, "{found:?}");
        assert_eq!(has("ReduceMean"), dialect == Dialect::Nnapi, "{found:?}");
        // Upsampling is part of the convolution behind it, where that is what pays.
        let is_portable = dialect == Dialect::Portable;
        assert_eq!((has("ConvTranspose"), has("Resize")), (is_portable, !is_portable), "{found:?}");
        assert_eq!(report.folded.get("upsampling_into_conv").copied(), is_portable.then_some(1), "{:?}", report.folded);
        // NNAPI cuts into equal parts only, which the class table's are not.
        assert_eq!(has("Slice"), dialect == Dialect::Nnapi, "{found:?}");
        // Norms as means are what candle's own evaluator can run too.
        let by_candle = report.engines.iter().find(|v| v.engine == "candle-onnx").unwrap();
        assert_eq!(by_candle.status == Status::Passed, dialect == Dialect::Nnapi, "{by_candle}");
    }
}

#[test]
fn what_a_dialect_cannot_express_is_refused_with_the_node_and_the_remedy() {
    let config = small(&[("act_fn", "gelu".into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let options = ExportOptions { dialect: Dialect::Nnapi, ..Default::default() };
    let error = export(&generator, &info(&config), &options, &folder.path().join("a.onnx")).unwrap_err().to_string();
    for part in ["norm1.gelu", "no error function", "--dialect portable"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let options = ExportOptions { dialect: Dialect::Native, ..options };
    let (_, graph) = export_and_read("gelu", &generator, &info(&config), &options);
    assert!(operators(&graph).contains("Gelu"));
}

/// The file of one class is the file of all at that label, with one input less.
#[test]
fn a_fixed_label_folds_into_the_graph() {
    let config = small(&[]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let [all, one] = ["all.onnx", "one.onnx"].map(|name| folder.path().join(name));
    let names = ModelInfo { classes: ["cat", "dog", "ant"].map(String::from).to_vec(), ..info(&config) };
    export(&generator, &names, &ExportOptions::default(), &all).unwrap();
    let options = ExportOptions { fixed_label: Some(1), batch: Batch::Fixed(2), ..Default::default() };
    export(&generator, &names, &options, &one).unwrap();
    let graph = candle_onnx::read_file(&one).unwrap().graph.unwrap();
    assert_eq!(graph.input.len(), 1);
    assert!(!graph.node.iter().any(|node| node.op_type == "Gather" || node.name.starts_with("class_table")));
    let load = |path: &Path| dmd_runtime::Generator::load(path, Default::default()).unwrap();
    let (all, one) = (load(&all), load(&one));
    assert_eq!((one.info().labelled(), one.info().fixed_class.as_deref()), (false, Some("dog")));
    let noise = dmd_runtime::picture_noise(3, 0, 2, [3, 8, 8]);
    let expected = all.run(noise.view(), &[1, 1]).unwrap().to_f32();
    let found = one.run(noise.view(), &[]).unwrap().to_f32();
    assert!(largest(&(&expected - &found)) < 1e-5 * largest(&expected));
}

#[test]
fn a_dynamic_batch_is_the_only_free_axis_and_takes_any_number() {
    let config = small(&[("attention_head_dim", 8.into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    for (dialect, output) in
        [(Dialect::Portable, Output::F32), (Dialect::Nnapi, Output::U8), (Dialect::Native, Output::F32)]
    {
        let folder = tempfile::tempdir().unwrap();
        let [free, fixed] = ["free.onnx", "fixed.onnx"].map(|name| folder.path().join(name));
        let options = ExportOptions { dialect, output, batch: Batch::Dynamic, ..Default::default() };
        export(&generator, &info(&config), &options, &free).unwrap();
        export(&generator, &info(&config), &ExportOptions { batch: Batch::Fixed(1), ..options }, &fixed).unwrap();
        let noise = dmd_runtime::picture_noise(4, 0, 5, [3, 8, 8]);
        for engine in [dmd_runtime::EngineChoice::Auto, dmd_runtime::EngineChoice::Tract] {
            let pictures = |path: &Path| {
                let options = dmd_runtime::Options { engine, ..Default::default() };
                let generator = dmd_runtime::Generator::load(path, options).unwrap();
                assert_eq!(generator.info().dynamic_batch, path == free);
                generator.run(noise.view(), &[0, 1, 2, 1, 0]).unwrap().to_f32()
            };
            // The u8 step is 2/255; f32 sums may be taken in another order.
            let limit = if output == Output::U8 { 0.008 } else { 1e-4 };
            assert!((pictures(&free) - pictures(&fixed)).iter().all(|x| x.abs() < limit), "{dialect} {engine:?}");
        }
        let graph = candle_onnx::read_file(&free).unwrap().graph.unwrap();
        for info in graph.input.iter().chain(&graph.output) {
            let Some(candle_onnx::onnx::type_proto::Value::TensorType(tensor)) =
                info.r#type.as_ref().and_then(|t| t.value.as_ref())
            else {
                panic!("{} has no type", info.name)
            };
            let free = |dim: &candle_onnx::onnx::tensor_shape_proto::Dimension| {
                use candle_onnx::onnx::tensor_shape_proto::dimension::Value;
                matches!(dim.value, Some(Value::DimParam(_)))
            };
            let axes: Vec<bool> = tensor.shape.as_ref().unwrap().dim.iter().map(free).collect();
            assert!(axes[0] && axes[1..].iter().all(|free| !free), "{}: {axes:?}", info.name);
        }
    }
}

/// Noise levels of a generator of three passes.
const STEPS: [f64; 3] = [80.0, 2.5, 0.4];

/// One network at each of its levels.
fn at_steps(config: &UNetConfig, steps: &[f64]) -> Vec<OneStep> {
    let weights = random_weights(config);
    steps.iter().map(|sigma| edm(config, &weights, *sigma)).collect()
}

/// What `dmd sample` makes in candle: x + sigma·eps between the passes, nothing divided (Yin et al. 2024, DMD2, 4.5).
fn in_candle(passes: &[OneStep], seed: u64, labels: Option<&[i64]>, n: usize) -> ndarray::Array4<f32> {
    let tensor = |noise: ndarray::Array4<f32>| {
        Tensor::from_vec(noise.iter().copied().collect(), noise.dim(), &Device::Cpu).unwrap()
    };
    let cond = Condition::of_classes(labels.unwrap_or_default().iter().copied(), &Device::Cpu).unwrap();
    let mut input = (tensor(dmd_runtime::picture_noise(seed, 0, n, [3, 8, 8])) * passes[0].generator.sigma).unwrap();
    for (pass, OneStep { generator: Generator { denoiser, sigma }, .. }) in passes.iter().enumerate() {
        if pass > 0 {
            let eps = tensor(dmd_runtime::noise::refining_noise(seed, pass, 0, n, [3, 8, 8]));
            input = (input + (eps * *sigma).unwrap()).unwrap();
        }
        input = denoiser.denoise(&Eager, &input, &[*sigma], &cond).unwrap();
    }
    ndarray::Array4::from_shape_vec((n, 3, 8, 8), input.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

fn largest(values: &ndarray::Array4<f32>) -> f32 {
    values.iter().fold(0f32, |max, x| max.max(x.abs()))
}

#[test]
fn several_passes_are_one_graph_that_makes_candles_pictures_by_every_engine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("steps.onnx");
    let scale_shift: (&str, serde_json::Value) = ("resnet_time_scale_shift", "scale_shift".into());
    let unconditional = ("num_class_embeds", serde_json::Value::Null);
    let kinds = [vec![], vec![unconditional.clone()], vec![scale_shift.clone()], vec![scale_shift, unconditional]];
    for (kind, changes) in kinds.iter().enumerate() {
        let config = small(changes);
        let passes = at_steps(&config, &STEPS);
        let labels = config.num_class_embeds.map(|_| &[2i64, 0, 1, 2, 0][..]);
        let expected = in_candle(&passes, 6, labels, 5);
        for (dialect, batch) in Dialect::ALL.into_iter().zip([Batch::Fixed(2), Batch::Dynamic, Batch::Fixed(1)]) {
            let options = ExportOptions { dialect, batch, force: true, ..Default::default() };
            let report = export_passes(&passes, &info(&config), &options, &path).unwrap();
            report.engines.iter().for_each(|verdict| eprintln!("{kind} {dialect}: {verdict}"));
            for engine in [dmd_runtime::EngineChoice::Auto, dmd_runtime::EngineChoice::Tract] {
                let options = dmd_runtime::Options { engine, ..Default::default() };
                let generator = dmd_runtime::Generator::load(&path, options).unwrap();
                assert_eq!(generator.info().sigmas, STEPS);
                let noise = dmd_runtime::picture_noise(6, 0, 5, [3, 8, 8]);
                let found = generator.run_seeded(noise.view(), labels.unwrap_or(&[]), 6).unwrap().to_f32();
                let difference = largest(&(&expected - found));
                assert!(difference < 1e-5 * largest(&expected), "{kind} {dialect} {engine:?}: {difference}");
            }
        }
    }
}

/// The weights are there once: a file of three passes is a file of one with longer tables and four products.
#[test]
fn several_passes_cost_rows_of_a_table_and_no_weights() {
    let config = small(&[]);
    let passes = at_steps(&config, &STEPS);
    let folder = tempfile::tempdir().unwrap();
    let [one, three] = ["one.onnx", "three.onnx"].map(|name| folder.path().join(name));
    let single = export(&passes[0], &info(&config), &Default::default(), &one).unwrap();
    let several = export_passes(&passes, &info(&config), &Default::default(), &three).unwrap();
    let graph = |path: &Path| candle_onnx::read_file(path).unwrap().graph.unwrap();
    let (one, three) = (graph(&one), graph(&three));
    let count = |graph: &candle_onnx::onnx::GraphProto, operator: &str| {
        graph.node.iter().filter(|node| node.op_type == operator).count()
    };
    assert_eq!(count(&three, "Conv"), count(&one, "Conv"));
    // c_in, c_skip and c_out: a lookup each, and a product where one pass has that of c_skip alone.
    assert_eq!((several.nodes, count(&three, "Gather")), (single.nodes + 5, count(&one, "Gather") + 3));
    assert_eq!(three.input.iter().map(|input| input.name.as_str()).collect::<Vec<_>>(), ["noise", "row"]);
    let table = three.initializer.iter().find(|tensor| tensor.name == "pass_table").unwrap();
    assert_eq!(table.dims[0], 9);
    let added = several.bytes - single.bytes;
    let rows = 6 * table.dims[1] as usize * 4;
    assert!(added < rows + 1500, "{added} bytes more, of which {rows} are rows");
}

#[test]
fn several_passes_come_in_every_precision_and_dialect() {
    let config = small(&[("block_out_channels", [32, 64].as_slice().into())]);
    let passes = at_steps(&config, &[10.0, 1.0]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("steps.onnx");
    for dialect in Dialect::ALL {
        for precision in [Precision::Fp16, Precision::W8, Precision::W8a8] {
            let options = ExportOptions { dialect, precision, force: true, ..Default::default() };
            let report = export_passes(&passes, &info(&config), &options, &path).unwrap();
            report.engines.iter().for_each(|verdict| eprintln!("{dialect} {precision}: {verdict}"));
            assert!(report.engines.iter().any(|v| v.engine == "tract" && v.status == Status::Passed));
            // What scales whole pictures keeps its precision.
            let graph = candle_onnx::read_file(&path).unwrap().graph.unwrap();
            let levels = graph.initializer.iter().filter(|tensor| tensor.dims == [6, 1, 1, 1]);
            assert_eq!(levels.filter(|tensor| tensor.data_type == 1).count(), 3, "{dialect} {precision}");
        }
    }
}

#[test]
fn one_class_and_outside_weights_go_with_several_passes() {
    let config = small(&[]);
    let passes = at_steps(&config, &STEPS);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.onnx");
    let options = ExportOptions { fixed_label: Some(1), external_data: true, ..Default::default() };
    export_passes(&passes, &info(&config), &options, &path).unwrap();
    let generator = dmd_runtime::Generator::load(&path, Default::default()).unwrap();
    assert_eq!((generator.info().labelled(), generator.info().fixed_class.as_deref()), (false, Some("1")));
    let expected = in_candle(&passes, 3, Some(&[1, 1]), 2);
    let found = generator.generate(&dmd_runtime::Request { seed: 3, batch: 2, ..Default::default() }).unwrap().to_f32();
    assert!(largest(&(&expected - found)) < 1e-5 * largest(&expected));
}

#[test]
fn passes_that_make_no_list_are_refused() {
    let config = small(&[]);
    let folder = tempfile::tempdir().unwrap();
    let refuse = |passes: &[OneStep], options: &ExportOptions| {
        export_passes(passes, &info(&config), options, &folder.path().join("a.onnx")).unwrap_err().to_string()
    };
    let plain = ExportOptions::default();
    for (steps, expected) in
        [(&[][..], "no pass"), (&[2.5, 2.5], "[2.5, 2.5], expected descending"), (&[0.4, 2.5], "descending")]
    {
        let error = refuse(&at_steps(&config, steps), &plain);
        assert!(error.contains(expected), "{error}");
    }
    let error = refuse(&at_steps(&config, &STEPS), &ExportOptions { output: Output::U8, ..plain.clone() });
    assert!(error.contains("output u8 with 3 passes") && error.contains("export f32"), "{error}");
    let mut passes = at_steps(&config, &STEPS);
    let silent = UNet::init(&config, &mut |_, n| vec![0.1; n]).unwrap();
    passes[2] = edm(&config, &silent, STEPS[2]);
    let error = refuse(&passes, &plain);
    assert!(error.contains("not one network at several noise levels: \"conv_in\" has other parameters"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn no_node_of_the_embeddings_is_left_and_each_is_named_after_its_layer() {
    let config = small(&[]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let (report, graph) = export_and_read("small", &generator, &info(&config), &Default::default());
    let names: Vec<&str> = graph.node.iter().map(|node| node.name.as_str()).collect();
    assert!(!names.iter().any(|name| name.contains("time") || name.contains("embedding")), "{names:?}");
    for expected in [
        "class_table.row",
        "conv_in",
        "down_blocks.0.resnets.0.norm1.silu",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.resnets.0.add",
        "down_blocks.1.attentions.0.attention.weights",
        "up_blocks.0.resnets.1.concat",
        "up_blocks.0.upsamplers.0.conv",
        "conv_norm_out.silu",
        "conv_out",
    ] {
        assert!(names.contains(&expected), "no {expected} in {names:?}");
    }
    // One lookup for the whole network, one product and one sum for the preconditioning. The norms' maps are
    // convolutions, and what feeds attention is one.
    assert_eq!(graph.node.iter().filter(|node| node.op_type == "Gather").count(), 1);
    assert_eq!(names[names.len() - 3..], ["conv_out", "affine", "add"]);
    assert!(report.folded["attention_scale"] >= 3, "{:?}", report.folded);
    let attentions = graph.node.iter().filter(|node| node.op_type == "Softmax").count();
    assert_eq!(names.iter().filter(|name| name.ends_with(".to_qkv")).count(), attentions);
    assert!(!names.iter().any(|name| name.ends_with(".to_q") || name.ends_with("norm1.scale")), "{names:?}");
}

/// Someone else's network: operations that the UNet does not have, or has only beside others.
struct Collage {
    canvas: Tensor,
    table: Embedding,
    conv: Conv2d,
    padded: bool,
}

impl Module for Collage {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([2, 8, 8])]
    }

    fn max_classes(&self) -> usize {
        3
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        cond: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        let label = cond.get(Way::Label).ok_or_else(|| dmd_models::Error::Config("a label is needed".into()))?;
        let canvas = b.constant(&self.canvas)?;
        // A picture for every label, known before the file runs.
        let picture = b.conv2d(&b.add_per_channel(&canvas, &b.embedding(label, &self.table)?)?, &self.conv)?;
        let noise = &inputs[0];
        let padded = if self.padded { b.pad_right_bottom(noise)? } else { noise.clone() };
        let coarse = b.upsample_2x(&b.avg_pool_2x(&padded)?)?;
        let both =
            b.conv2d(&b.concat(&b.activation(noise, Activation::Relu)?, &b.add(&coarse, &picture)?)?, &self.mix())?;
        Ok(vec![b.add(&b.affine(&b.activation(&both, Activation::Gelu)?, &[0.5], 0.25)?, &canvas)?])
    }
}

impl Collage {
    fn new(padded: bool) -> Self {
        let normal = |index, shape: &[usize]| {
            let values = Stream::new(2, 4, index).normal(shape.iter().product());
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let conv = Conv2d { name: "paint".into(), weight: normal(0, &[2, 2, 3, 3]), bias: None, stride: 1, padding: 1 };
        let table = Embedding { name: "colours".into(), weight: normal(1, &[3, 2]) };
        Collage { canvas: normal(2, &[1, 2, 8, 8]), table, conv, padded }
    }

    fn mix(&self) -> Conv2d {
        let weight = Tensor::cat(&[&self.conv.weight, &self.conv.weight], 1).unwrap();
        Conv2d { name: "mix".into(), weight, ..self.conv.clone() }
    }
}

#[test]
fn a_users_own_network_exports_the_same_way() {
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    for (batch, padded) in [(1, true), (2, false)] {
        let options = ExportOptions { batch: Batch::Fixed(batch), ..Default::default() };
        let (report, graph) = export_and_read("collage", &Collage::new(padded), &info, &options);
        assert_eq!(operators(&graph).contains("Pad"), padded);
        // Without Pad there is nothing that candle's own evaluator lacks.
        assert!(padded || report.engines.iter().any(|v| v.engine == "candle-onnx" && v.status == Status::Passed));
        // The convolution of the labels' pictures was carried out; the other one is left.
        assert_eq!(graph.node.iter().filter(|node| node.op_type == "Conv").count(), 1);
    }
}

/// With F = 0, EDM's D(σ·n, σ) is σ_data²/(σ² + σ_data²)·σ·n (Karras et al. 2022, equation 7 and table 1).
#[test]
fn a_silent_network_exports_as_the_gaussian_denoiser() {
    let config = small(&[("num_class_embeds", serde_json::Value::Null)]);
    let silent = UNet::init(&config, &mut |name, n| Stream::new(0, 3, name.len() as u64).uniform(n)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("silent.onnx");
    for sigma in [0.5, 80.0] {
        let options = ExportOptions { force: true, ..Default::default() };
        export(&edm(&config, &silent, sigma), &info(&config), &options, &path).unwrap();
        let options = dmd_runtime::Options { engine: dmd_runtime::EngineChoice::Tract, ..Default::default() };
        let noise = dmd_runtime::picture_noise(9, 0, 2, [3, 8, 8]);
        let images = dmd_runtime::Generator::load(&path, options).unwrap().run(noise.view(), &[]).unwrap();
        let factor = 0.25 / (sigma * sigma + 0.25) * sigma;
        for (found, noise) in images.to_f32().iter().zip(&noise) {
            assert!((f64::from(*found) - factor * f64::from(*noise)).abs() < 1e-6);
        }
    }
}

#[test]
fn a_file_says_what_it_is_and_has_the_same_bytes_every_time() {
    let config = small(&[]);
    let weights = random_weights(&config);
    let generator = edm(&config, &weights, 2.5);
    let names = ["cat", "dog \"x\"", "ant"].map(String::from).to_vec();
    let info = ModelInfo { classes: names.clone(), weights_sha256: weights_sha256(&weights).unwrap() };
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["a.onnx", "b.onnx"].map(|name| folder.path().join(name));
    let options = ExportOptions { batch: Batch::Fixed(2), output: Output::U8, ..Default::default() };
    export(&generator, &info, &options, &first).unwrap();
    export(&generator, &info, &options, &second).unwrap();
    assert!(fs::read(&first).unwrap() == fs::read(&second).unwrap());
    let read = dmd_runtime::Info::read(&first).unwrap();
    assert_eq!((read.batch, read.shape(), read.output, read.file.opset), (2, [3, 8, 8], Output::U8, 17));
    assert_eq!((read.sigmas, read.classes, read.dialect.as_str()), (vec![2.5], names, "portable"));
    assert_eq!(read.weights_sha256, info.weights_sha256);
}

#[test]
fn a_weight_of_another_value_or_name_changes_the_hash() {
    let weights = |name: &str, value: f32| {
        let mut weights = Weights::default();
        weights.insert(name, Tensor::new(&[value, 2.0], &Device::Cpu).unwrap());
        weights_sha256(&weights).unwrap()
    };
    assert_eq!(weights("a", 1.0).len(), 64);
    assert_eq!(weights("a", 1.0), weights("a", 1.0));
    assert_ne!(weights("a", 1.0), weights("b", 1.0));
    assert_ne!(weights("a", 1.0), weights("a", 1.5));
}

/// Exports the small generator as `options` and `info` say, expects an error, and that the folder is as before.
fn refused(change: impl FnOnce(&mut ModelInfo, &mut ExportOptions), file: &str) -> (Error, usize) {
    refused_of_size([8, 8], change, file)
}

fn refused_of_size(
    size: [usize; 2],
    change: impl FnOnce(&mut ModelInfo, &mut ExportOptions),
    file: &str,
) -> (Error, usize) {
    let config = small(&[]);
    let generator = OneStep { size, ..edm(&config, &random_weights(&config), 2.5) };
    let (mut info, mut options) = (info(&config), ExportOptions::default());
    change(&mut info, &mut options);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("taken.onnx"), "here first").unwrap();
    let error = export(&generator, &info, &options, &folder.path().join(file)).unwrap_err();
    assert_eq!(fs::read_to_string(folder.path().join("taken.onnx")).unwrap(), "here first");
    (error, fs::read_dir(folder.path()).unwrap().count())
}

#[test]
fn a_difference_over_the_tolerance_leaves_no_file() {
    for file in ["new.onnx", "taken.onnx"] {
        let (error, files) = refused(|_, options| (options.tolerance, options.force) = (1e-12, true), file);
        assert!(
            matches!(&error, Error::Verification(engines) if engines.iter().any(|e| e.contains("tract"))),
            "{error}"
        );
        assert_eq!(files, 1);
    }
}

#[test]
fn a_prepared_file_needs_no_network_and_has_no_name_until_it_is_verified() {
    let config = small(&[]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generator.onnx");
    let prepared = |options: &ExportOptions| {
        let passes = [edm(&config, &random_weights(&config), 2.5)];
        dmd_export::prepare(&passes, &info(&config), options, &path).unwrap()
    };
    let left = || fs::read_dir(folder.path()).unwrap().count();
    let options = ExportOptions { external_data: true, ..Default::default() };
    drop(prepared(&options));
    assert_eq!(left(), 0);
    let error = prepared(&ExportOptions { tolerance: 1e-12, ..options.clone() }).verify().unwrap_err();
    assert!(matches!(error, Error::Verification(_)), "{error}");
    assert_eq!(left(), 0);
    let prepared = prepared(&options);
    assert!(!path.exists());
    let report = prepared.verify().unwrap();
    assert!(path.exists() && report.engines.iter().any(|engine| engine.status == Status::Passed), "{report:?}");
    assert_eq!(left(), 2);
}

#[test]
fn bad_settings_and_paths_are_refused_by_name() {
    type Change = fn(&mut ModelInfo, &mut ExportOptions);
    let cases: [(&str, &str, Change); 13] = [
        ("new.onnx", "fixed label 3, expected one of the network's 3: 0 to 2", |_, options| {
            options.fixed_label = Some(3)
        }),
        ("taken.onnx", "exists already", |_, _| {}),
        ("no/such/folder.onnx", "cannot write", |_, _| {}),
        (".", "it is a folder", |_, options| options.force = true),
        ("new.onnx", "batch is 0", |_, options| options.batch = Batch::Fixed(0)),
        ("new.onnx", "4 classes are named, the network has 3", |info, _| info.classes = vec![String::new(); 4]),
        ("new.onnx", "tolerance is 0", |_, options| options.tolerance = 0.0),
        ("new.onnx", "min_psnr_db is 30, which says nothing of a file in fp32: leave it out, or", |_, options| {
            options.min_psnr_db = Some(30.0)
        }),
        ("new.onnx", "export with --precision w8a8", |_, options| {
            (options.max_drop_db, options.precision) = (Some(3.0), Precision::W8)
        }),
        ("new.onnx", "min_psnr_db is NaN, expected 0 or more", |_, options| {
            (options.min_psnr_db, options.precision) = (Some(f64::NAN), Precision::W8)
        }),
        ("new.onnx", "min_psnr_db is inf, expected 0 or more", |_, options| {
            (options.min_psnr_db, options.precision) = (Some(f64::INFINITY), Precision::W8)
        }),
        ("new.onnx", "max_drop_db is -1, expected 0 or more", |_, options| {
            (options.max_drop_db, options.precision) = (Some(-1.0), Precision::W8a8)
        }),
        ("new.onnx", "max_drop_db is NaN, expected 0 or more", |_, options| {
            (options.max_drop_db, options.precision) = (Some(f64::NAN), Precision::W8a8)
        }),
    ];
    let (error, _) = refused_of_size([0, 8], |_, _| {}, "new.onnx");
    assert!(error.to_string().contains("height is 0"), "{error}");
    for (file, expected, change) in cases {
        let (error, files) = refused(change, file);
        assert!(error.to_string().contains(expected), "expected {expected:?} in {error}");
        assert_eq!(files, 1, "{expected}");
    }
}

/// Python's own checker, where it is installed: every file has types and shapes for all of its values by plain inference,
/// the strict one at that.
#[test]
fn the_onnx_checker_accepts_the_file_where_it_is_installed() {
    let folder = tempfile::tempdir().unwrap();
    let script = "import sys, onnx\n\
        for path in sys.argv[1:]:\n \
         onnx.checker.check_model(path, full_check=True)\n \
         graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph\n \
         known = {v.name: v.type.tensor_type.shape.dim for v in [*graph.value_info, *graph.output]}\n \
         free = lambda dims: [i for i, d in enumerate(dims) if not d.dim_value]\n \
         for node in graph.node:\n  \
          for name in node.output: assert free(known[name]) in ([], [0]), (path, node.name, known[name])\n \
         assert any(free(dims) for dims in known.values()) == ('Dynamic' in path), path";
    let python = std::env::var("PYTHON").unwrap_or("python3".into());
    let installed = std::process::Command::new(&python).args(["-c", "import onnx"]).output();
    if !installed.is_ok_and(|output| output.status.success()) {
        return eprintln!("skipped: {python} has no onnx package (set PYTHON to one that has)");
    }
    let mut paths = Vec::new();
    for dialect in Dialect::ALL {
        // nnapi has no gelu.
        let act_fn = if dialect == Dialect::Nnapi { "mish" } else { "gelu" };
        let config = small(&[("act_fn", act_fn.into()), ("resnet_time_scale_shift", "scale_shift".into())]);
        let generator = edm(&config, &random_weights(&config), 2.5);
        let mut write = |precision: Precision, output: Output, batch: Batch, external_data: bool| {
            let (min_psnr_db, engines) = (least_psnr(precision), EngineChoice::Tract);
            let options = ExportOptions {
                dialect,
                precision,
                output,
                batch,
                external_data,
                min_psnr_db,
                engines,
                ..Default::default()
            };
            let path = folder.path().join(format!("{dialect}-{precision}-{output:?}-{batch:?}-{external_data}.onnx"));
            export(&generator, &info(&config), &options, &path).unwrap();
            paths.push(path);
        };
        for precision in Precision::ALL {
            write(precision, Output::F32, Batch::Fixed(1), false);
            write(precision, Output::U8, Batch::Fixed(2), true);
            write(precision, Output::U8, Batch::Dynamic, false);
        }
    }
    let output = std::process::Command::new(&python).args(["-c", script]).args(&paths).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// GroupNormalization is a function, behind which plain inference sees nothing: such files say the types themselves.
#[test]
fn types_of_values_are_stated_where_onnx_does_not_infer_them() {
    for dialect in Dialect::ALL {
        let (_, graph) = in_precision(dialect, Precision::W8);
        let values: BTreeSet<&str> = graph.node.iter().flat_map(|node| &node.output).map(String::as_str).collect();
        let stated: BTreeSet<&str> = graph.value_info.iter().map(|info| info.name.as_str()).collect();
        let expected = if dialect == Dialect::Native { values.len() - 1 } else { 0 };
        assert!(stated.len() == expected && stated.is_subset(&values), "{dialect}: {stated:?} of {values:?}");
    }
}

#[test]
fn no_constant_is_stored_twice() {
    for dialect in Dialect::ALL {
        for precision in Precision::ALL {
            let (_, graph) = in_precision(dialect, precision);
            let mut seen = BTreeSet::new();
            for tensor in &graph.initializer {
                let content = (tensor.data_type, &tensor.dims, &tensor.raw_data);
                assert!(seen.insert(content), "{dialect} {precision}: {} is another one's equal", tensor.name);
            }
        }
    }
}

/// The small generator, with weights of its own, in one dialect and precision.
fn in_precision(dialect: Dialect, precision: Precision) -> (ExportReport, candle_onnx::onnx::GraphProto) {
    let config = small(&[("attention_head_dim", 8.into()), ("block_out_channels", [32, 64].as_slice().into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let options = ExportOptions { dialect, precision, ..Default::default() };
    export_and_read(&format!("{dialect} {precision}"), &generator, &info(&config), &options)
}

#[test]
fn every_precision_keeps_its_likeness_in_every_dialect_and_every_engine() {
    for dialect in Dialect::ALL {
        let (plain, _) = in_precision(dialect, Precision::Fp32);
        // Part of fp32's size, with room for a graph that is large for its few weights.
        for (precision, size) in [(Precision::Fp16, 0.6), (Precision::W8, 0.45), (Precision::W8a8, 0.65)] {
            let (report, graph) = in_precision(dialect, precision);
            let part = report.bytes as f64 / plain.bytes as f64;
            assert!(part < size, "{dialect} {precision}: {part} of fp32's size");
            let found = operators(&graph);
            assert_eq!(found.contains("DequantizeLinear"), precision != Precision::Fp16, "{found:?}");
            assert_eq!(found.contains("QuantizeLinear"), precision == Precision::W8a8, "{found:?}");
            for verdict in report.engines.iter().filter(|verdict| verdict.engine != "candle-onnx") {
                let absent = matches!(&verdict.status, Status::Skipped(_));
                assert!(
                    absent || verdict.psnr_db.unwrap() >= precision.min_psnr_db(),
                    "{dialect} {precision}: {verdict}"
                );
            }
        }
    }
}

/// How far ONNX Runtime and tract are apart, as the runtime's README has it: in full precision by the order of sums; in
/// w8a8 a value near the edge of a step falls to either side, and moves what is computed from it.
#[test]
fn two_engines_are_as_near_to_each_other_as_the_precision_allows() {
    let present =
        |kind| dmd_runtime::engines(None).into_iter().any(|engine| engine.kind == kind && engine.is_present());
    if !present(dmd_runtime::EngineKind::OnnxRuntime) {
        return eprintln!("skipped: no ONNX Runtime here");
    }
    let config = small(&[("attention_head_dim", 8.into()), ("block_out_channels", [32, 64].as_slice().into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.onnx");
    for (precision, least_db) in
        [(Precision::Fp32, 120.0), (Precision::Fp16, 60.0), (Precision::W8, 120.0), (Precision::W8a8, 35.0)]
    {
        let options = ExportOptions { precision, force: true, ..Default::default() };
        export(&generator, &info(&config), &options, &path).unwrap();
        let pictures = |engine| {
            let options = dmd_runtime::Options { engine, ..Default::default() };
            let request = dmd_runtime::Request { seed: 3, batch: 8, ..Default::default() };
            dmd_runtime::Generator::load(&path, options).unwrap().generate(&request).unwrap().to_f32()
        };
        let (a, b) = (pictures(EngineChoice::OnnxRuntime), pictures(EngineChoice::Tract));
        let square = (&a - &b).mapv(|x| f64::from(x).powi(2)).mean().unwrap();
        let psnr = 10.0 * (4.0 / square).log10();
        eprintln!("{precision}: {psnr:.1} dB, at most {} apart", largest(&(&a - &b)));
        assert!(psnr >= least_db, "{precision}: {psnr} dB");
    }
}

#[test]
fn w8a8_keeps_the_outermost_layers_and_the_worst_in_fp32() {
    let layers = |max_drop_db: f64| {
        let config = small(&[]);
        let generator = edm(&config, &random_weights(&config), 2.5);
        let options = ExportOptions {
            precision: Precision::W8a8,
            max_drop_db: Some(max_drop_db),
            min_psnr_db: Some(20.0),
            ..Default::default()
        };
        export_and_read(&format!("w8a8 within {max_drop_db} dB"), &generator, &info(&config), &options)
    };
    let (tight, graph) = layers(1.0);
    let (loose, _) = layers(60.0);
    let kept = |report: &ExportReport| report.layers.iter().filter(|layer| layer.kept_float).count();
    assert!(kept(&loose) == 0 && kept(&tight) > 0 && kept(&tight) < tight.layers.len(), "{:?}", tight.layers);
    // The worst come first, and they are the ones that stay.
    assert!(tight.layers.is_sorted_by(|a, b| a.psnr_db <= b.psnr_db));
    assert!(tight.layers.iter().rev().skip_while(|layer| !layer.kept_float).all(|layer| layer.kept_float));
    assert!(tight.layers.iter().all(|layer| layer.node != "conv_in" && layer.node != "conv_out"));
    let reads = |name: &str| graph.node.iter().find(|node| node.name == name).unwrap().input.clone();
    assert_eq!(reads("conv_in")[0], "noise");
    let weight = &reads(&tight.layers.last().unwrap().node)[1];
    let maker = graph.node.iter().find(|node| node.output[0] == *weight).unwrap();
    assert!(maker.op_type == "DequantizeLinear" && maker.name.ends_with(".weight.float.dequantize"), "{maker:?}");
    let psnr = |report: &ExportReport| report.engines.iter().find(|v| v.engine == "tract").unwrap().psnr_db.unwrap();
    assert!(psnr(&tight) > psnr(&loose) + 1.0, "{} and {}", psnr(&tight), psnr(&loose));
}

/// What a layer costs does not hang on whether the picture is rounded to bytes at the end.
#[test]
fn layers_cost_the_same_whatever_the_output_is() {
    let config = small(&[("block_out_channels", [32, 64].as_slice().into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let layers = |output: Output| {
        let options = ExportOptions { precision: Precision::W8a8, output, ..Default::default() };
        let (mut report, _) = export_and_read(&format!("w8a8 {output:?}"), &generator, &info(&config), &options);
        report.layers.sort_by(|a, b| a.node.cmp(&b.node));
        report.layers
    };
    let (floats, bytes) = (layers(Output::F32), layers(Output::U8));
    assert!(floats.len() == bytes.len() && floats.len() > 5);
    for (a, b) in floats.iter().zip(&bytes) {
        let alike = a.node == b.node && a.kept_float == b.kept_float && (a.psnr_db - b.psnr_db).abs() < 1.0;
        assert!(alike, "{a:?} and {b:?}");
    }
}

/// Attention of a picture's pixels to each other, 256 keys of 16 channels.
struct Attentive {
    first: Conv2d,
    projections: [Conv2d; 3],
    last: Conv2d,
}

impl Attentive {
    fn new() -> Self {
        let conv = |index: u64, from: usize, to: usize, kernel: usize| {
            let values = Stream::new(3, 5, index).normal(to * from * kernel * kernel);
            let weight = Tensor::from_vec(values, (to, from, kernel, kernel), &Device::Cpu).unwrap();
            let weight = (weight / ((from * kernel * kernel) as f64).sqrt()).unwrap();
            Conv2d { name: format!("conv_{index}"), weight, bias: None, stride: 1, padding: kernel / 2 }
        };
        let projections = [1, 2, 3].map(|index| conv(index, 16, 16, 1));
        Attentive { first: conv(0, 3, 16, 3), projections, last: conv(4, 16, 3, 3) }
    }
}

impl Module for Attentive {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([3, 16, 16])]
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        _: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        let x = b.conv2d(&inputs[0], &self.first)?;
        let [q, k, v] = [0, 1, 2].map(|i| b.conv2d(&x, &self.projections[i]));
        Ok(vec![b.conv2d(&b.add(&x, &b.attention(&q?, &k?, &v?, 1)?)?, &self.last)?])
    }
}

/// Of attention's two products, one sums over 256 keys, the other over 16 channels.
#[test]
fn a_product_of_two_values_is_quantised_where_its_sums_are_long() {
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    let options = ExportOptions { precision: Precision::W8a8, max_drop_db: Some(60.0), ..Default::default() };
    let (report, graph) = export_and_read("attention in w8a8", &Attentive::new(), &info, &options);
    assert_eq!(report.layers.iter().map(|layer| layer.node.as_str()).collect::<Vec<_>>(), ["attention.mix"]);
    assert!(!report.layers[0].kept_float);
    let node = |name: &str| graph.node.iter().find(|node| node.name == name).unwrap();
    let maker = |value: &String| graph.node.iter().find(|node| node.output.contains(value)).unwrap();
    for input in &node("attention.mix").input {
        let back = maker(input);
        assert_eq!(
            (back.op_type.as_str(), maker(&back.input[0]).op_type.as_str()),
            ("DequantizeLinear", "QuantizeLinear")
        );
    }
    let operators = |name: &str| node(name).input.iter().map(|input| maker(input).op_type.as_str()).collect::<Vec<_>>();
    assert_eq!(operators("attention.scores"), ["Transpose", "Split"]);
}

#[test]
fn a_value_that_half_precision_cannot_hold_stays_in_single_precision() {
    let config = small(&[]);
    let mut weights = random_weights(&config);
    // Large before a norm, which hides it from the picture.
    let name = "down_blocks.0.resnets.0.conv1.weight";
    weights.insert(name, (weights.get(name).unwrap() * 3e4).unwrap());
    let generator = edm(&config, &weights, 2.5);
    let options = ExportOptions { precision: Precision::Fp16, ..Default::default() };
    let (report, _) = export_and_read("overflow", &generator, &info(&config), &options);
    assert!(report.kept_float.iter().any(|node| node == "down_blocks.0.resnets.0.conv1"), "{:?}", report.kept_float);
    assert!(report.kept_float.len() < report.nodes / 4, "{:?}", report.kept_float);
}

/// Large negative numbers, and zeros behind them.
struct Hidden;

impl Module for Hidden {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([3, 8, 8])]
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        _: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        let conv = |name: &str, value: f32| {
            let weight = Tensor::full(value, (3, 3, 3, 3), &Device::Cpu).unwrap();
            Conv2d { name: name.into(), weight, bias: None, stride: 1, padding: 1 }
        };
        let x = b.conv2d(&inputs[0], &conv("first", 0.2))?;
        let large = b.conv2d(&b.activation(&x, Activation::Relu)?, &conv("hidden", -6e4))?;
        Ok(vec![b.conv2d(&b.add(&x, &b.activation(&large, Activation::Relu)?)?, &conv("last", 0.1))?])
    }
}

/// A value beyond the range of half precision that the pictures do not show, so that their likeness does not tell.
#[test]
fn a_value_that_half_precision_cannot_hold_is_refused_where_the_picture_hides_it() {
    let folder = tempfile::tempdir().unwrap();
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    let options = ExportOptions { precision: Precision::Fp16, ..Default::default() };
    let error = export(&Hidden, &info, &options, &folder.path().join("a.onnx")).unwrap_err();
    let Error::Overflow { node, value } = &error else { panic!("{error}") };
    assert!(node.starts_with("hidden") && *value > 65504.0, "{error}");
    assert!(error.to_string().contains("--precision fp32 or w8"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The likeness that a file has is not enough: the nodes that lose most stay in single precision until it is.
#[test]
fn half_precision_gives_up_as_many_nodes_as_the_likeness_asks_for() {
    let config = small(&[("block_out_channels", [32, 64].as_slice().into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.onnx");
    let half = |min_psnr_db| {
        let options = ExportOptions { precision: Precision::Fp16, min_psnr_db, force: true, ..Default::default() };
        export(&generator, &info(&config), &options, &path).unwrap()
    };
    let psnr = |report: &ExportReport| {
        report.engines.iter().filter_map(|verdict| verdict.psnr_db).fold(f64::INFINITY, f64::min)
    };
    let plain = half(None);
    assert_eq!(plain.kept_float, [""; 0], "at {} dB", psnr(&plain));
    let mut kept = 0;
    for more in [2.0, 8.0] {
        let wanted = psnr(&plain) + more;
        let report = half(Some(wanted));
        eprintln!("{wanted:.1} dB: {:.1} by {} of {} nodes", psnr(&report), report.kept_float.len(), report.nodes);
        assert!(psnr(&report) >= wanted && report.kept_float.len() > kept, "{:?}", report.kept_float);
        assert!(report.kept_float.len() < report.nodes / 2 && report.bytes > plain.bytes, "{:?}", report.kept_float);
        kept = report.kept_float.len();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(half(Some(wanted)).kept_float, report.kept_float);
        assert!(fs::read(&path).unwrap() == bytes, "the same request gives another file");
    }
}

#[test]
fn a_batch_that_cannot_fit_is_refused_before_memory_is_taken() {
    let config = small(&[]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let refused = |batch, max_memory| {
        let options = ExportOptions { batch: Batch::Fixed(batch), max_memory, ..Default::default() };
        let error = export(&generator, &info(&config), &options, &folder.path().join("a.onnx")).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        error.to_string()
    };
    for batch in [100_000_000, 1 << 40, usize::MAX] {
        let error = refused(batch, None);
        assert!(error.starts_with(&format!("batch is {batch}, with 3 × 8 × 8 values a sample of noise")), "{error}");
    }
    let error = refused(100_000, Some(1 << 30));
    assert!(
        error.starts_with("batch is 100000: to check the file takes about") && error.contains("1024 MiB are free"),
        "{error}"
    );
}

#[test]
fn external_data_lies_beside_the_file_aligned_and_makes_the_same_pictures() {
    let config = small(&[]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let [inside, outside] = ["inside.onnx", "outside.onnx"].map(|name| folder.path().join(name));
    let options = ExportOptions { external_data: true, ..Default::default() };
    let report = export(&generator, &info(&config), &options, &outside).unwrap();
    export(&generator, &info(&config), &ExportOptions::default(), &inside).unwrap();
    let data = folder.path().join("outside.onnx.data");
    assert_eq!(report.bytes as u64, fs::metadata(&outside).unwrap().len() + fs::metadata(&data).unwrap().len());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    let graph = candle_onnx::read_file(&outside).unwrap().graph.unwrap();
    let offsets = graph.initializer.iter().flat_map(|tensor| &tensor.external_data);
    let offsets: Vec<usize> = offsets.filter(|e| e.key == "offset").map(|e| e.value.parse().unwrap()).collect();
    assert!(offsets.len() > 10 && offsets.iter().all(|offset| offset % 4096 == 0), "{offsets:?}");
    let noise = dmd_runtime::picture_noise(5, 0, 3, [3, 8, 8]);
    let pictures = |path: &Path, engine| {
        let options = dmd_runtime::Options { engine, ..Default::default() };
        dmd_runtime::Generator::load(path, options).unwrap().run(noise.view(), &[0, 1, 2]).unwrap().to_f32()
    };
    for engine in [dmd_runtime::EngineChoice::Auto, dmd_runtime::EngineChoice::Tract] {
        assert_eq!(pictures(&outside, engine), pictures(&inside, engine));
    }
    let error = export(&generator, &info(&config), &options, &outside).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    // Weights that are cut off, or named elsewhere, are found before an engine follows them.
    let whole = fs::read(&data).unwrap();
    fs::write(&data, &whole[..whole.len() / 2]).unwrap();
    let error = dmd_runtime::Info::read(&outside).unwrap_err().to_string();
    assert!(error.contains("beyond the end of") && error.contains("outside.onnx.data"), "{error}");
    fs::remove_file(&data).unwrap();
    assert!(dmd_runtime::Info::read(&outside).unwrap_err().to_string().contains("its weights, "));
    let bytes = fs::read(&outside).unwrap();
    let name = b"outside.onnx.data";
    let elsewhere: Vec<u8> =
        bytes.iter().enumerate().map(|(i, byte)| if bytes[i..].starts_with(name) { b'/' } else { *byte }).collect();
    fs::write(&outside, elsewhere).unwrap();
    let error = dmd_runtime::Info::read(&outside).unwrap_err().to_string();
    assert!(error.contains("expected one file beside it"), "{error}");
}

/// A file that takes its weights in takes the place of both; what is not ours stays.
#[test]
fn weights_beside_a_replaced_file_go_with_it() {
    let config = small(&[]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let [path, data] = ["a.onnx", "a.onnx.data"].map(|name| folder.path().join(name));
    let write = |external_data: bool| {
        let options = ExportOptions { external_data, force: true, ..Default::default() };
        export(&generator, &info(&config), &options, &path).unwrap();
    };
    write(true);
    assert!(data.exists());
    write(true);
    assert!(data.exists());
    write(false);
    assert!(!data.exists());
    fs::write(&data, "mine").unwrap();
    write(false);
    assert_eq!(fs::read_to_string(&data).unwrap(), "mine");
    fs::write(&path, "mine too").unwrap();
    write(false);
    assert_eq!(fs::read_to_string(&data).unwrap(), "mine");
}

#[test]
fn a_file_over_its_limit_is_refused_with_its_size() {
    let (error, files) = refused(|_, options| options.max_size = Some(10_000), "new.onnx");
    assert!(matches!(error, Error::OverMaxSize { limit: 10_000, .. }), "{error}");
    assert!(error.to_string().contains("--precision fp16"), "{error}");
    assert_eq!(files, 1);
}

#[test]
fn every_dialect_and_precision_has_the_same_bytes_every_time() {
    let config = small(&[]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let bytes = |name: &str, options: &ExportOptions| {
        let path = folder.path().join(name);
        export(&generator, &info(&config), options, &path).unwrap();
        fs::read(path).unwrap()
    };
    for dialect in Dialect::ALL {
        for precision in Precision::ALL {
            let (engines, force, min_psnr_db) = (EngineChoice::Tract, true, least_psnr(precision));
            let options = ExportOptions { dialect, precision, engines, force, min_psnr_db, ..Default::default() };
            assert!(bytes("a.onnx", &options) == bytes("b.onnx", &options), "{dialect} {precision}");
        }
    }
}

/// A picture that is the noise: what comes out of a u8 file is then all that its tail does.
struct Same;

impl Module for Same {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([3, 16, 16])]
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        _: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        Ok(vec![b.affine(&inputs[0], &[1.0], 0.0)?])
    }
}

/// floor(127.5·x + 128), clipped: at every byte's value, at the edges between bytes, and outside of the range.
#[test]
fn bytes_are_rounded_exactly() {
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("same.onnx");
    export(&Same, &info, &ExportOptions { output: Output::U8, ..Default::default() }, &path).unwrap();
    let levels = |at: f32| (0..256).map(move |byte| (byte as f32 + at) / 127.5 - 1.0);
    let values: Vec<f32> = levels(0.0).chain(levels(0.4990)).chain(levels(-0.4990)).collect();
    let mut noise = ndarray::Array4::from_shape_vec((1, 3, 16, 16), values).unwrap();
    for outside in [1.0, 3.0] {
        for engine in [dmd_runtime::EngineChoice::Auto, dmd_runtime::EngineChoice::Tract] {
            let options = dmd_runtime::Options { engine, ..Default::default() };
            let images = dmd_runtime::Generator::load(&path, options).unwrap().run(noise.view(), &[]).unwrap();
            let found = images.to_u8();
            for ((_, c, y, x), value) in noise.indexed_iter() {
                assert_eq!(found[[0, y, x, c]], dmd_runtime::quantize(*value), "{value} ×{outside} {engine:?}");
            }
            let byte = |c: usize| found.index_axis(ndarray::Axis(3), c).iter().copied().collect::<Vec<u8>>();
            assert!(outside > 1.0 || [0, 1, 2].iter().all(|c| byte(*c) == (0..=255).collect::<Vec<u8>>()));
        }
        noise *= 3.0;
    }
}

/// A convolution that ends in steps of bytes around 0: the range of the output, folded in, leaves the factor 1.
struct Steps(Conv2d);

impl Module for Steps {
    fn inputs(&self) -> Vec<Input> {
        vec![Input::noise([3, 16, 16])]
    }

    fn run<B: Backend>(
        &self,
        b: &B,
        inputs: &[B::Value],
        _: &Condition<B::Value>,
    ) -> dmd_models::Result<Vec<B::Value>> {
        Ok(vec![b.conv2d(&inputs[0], &self.0)?])
    }
}

/// A value in the middle between two bytes goes to the upper one, the next number below it to the lower one.
#[test]
fn halves_are_rounded_up_where_the_range_is_part_of_the_last_convolution() {
    let diagonal = |i: usize| if i.is_multiple_of(4) { 1.0 / 127.5 } else { 0f32 };
    let weight = Tensor::from_vec((0..9).map(diagonal).collect(), (3, 3, 1, 1), &Device::Cpu).unwrap();
    let network = Steps(Conv2d { name: "last".into(), weight, bias: None, stride: 1, padding: 0 });
    let info = ModelInfo { classes: vec![], weights_sha256: String::new() };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("steps.onnx");
    let options = ExportOptions { output: Output::U8, ..Default::default() };
    let report = export(&network, &info, &options, &path).unwrap();
    assert_eq!(report.folded, [("map_into_previous_conv", 1)].into_iter().collect());
    let graph = candle_onnx::read_file(&path).unwrap().graph.unwrap();
    let weight = graph.initializer.iter().find(|tensor| tensor.name == "last.weight").unwrap();
    assert!(weight.raw_data.chunks(4).step_by(4).all(|value| value == 1f32.to_le_bytes()));
    // Of these steps, 128 more is the byte: 0 to 255 exactly, just below, and halfway to the next.
    let steps = (0..256).map(|byte| byte as f32 - 128.0);
    let below = |step: f32| step - 128.0 * f32::EPSILON;
    let values = steps.clone().chain(steps.clone().map(below)).chain(steps.map(|step| step + 0.5)).collect();
    let noise = ndarray::Array4::from_shape_vec((1, 3, 16, 16), values).unwrap();
    for engine in [dmd_runtime::EngineChoice::Auto, dmd_runtime::EngineChoice::Tract] {
        let options = dmd_runtime::Options { engine, ..Default::default() };
        let images = dmd_runtime::Generator::load(&path, options).unwrap().run(noise.view(), &[]).unwrap();
        let found = images.to_u8();
        let byte = |c: usize| found.index_axis(ndarray::Axis(3), c).iter().copied().collect::<Vec<u8>>();
        assert_eq!(byte(0), (0..=255).collect::<Vec<u8>>(), "{engine:?}");
        assert_eq!(byte(1), (0..=255).map(|byte: u8| byte.saturating_sub(1)).collect::<Vec<u8>>(), "{engine:?}");
        assert_eq!(byte(2), byte(0), "{engine:?}");
    }
}

/// ONNX Runtime's own format in every precision, held to what the precision is held to.
#[test]
fn every_precision_and_output_goes_into_the_format_of_onnx_runtime() {
    let present = dmd_runtime::engines(None)
        .into_iter()
        .any(|engine| engine.kind == dmd_runtime::EngineKind::OnnxRuntime && engine.is_present());
    if !present {
        return eprintln!("skipped: no ONNX Runtime here");
    }
    let config = small(&[("block_out_channels", [32, 64].as_slice().into())]);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let folder = tempfile::tempdir().unwrap();
    let [onnx, ort] = ["a.onnx", "a.ort"].map(|name| folder.path().join(name));
    for precision in Precision::ALL {
        for output in [Output::F32, Output::U8] {
            // Weights that lie outside go into the one file as well.
            let external_data = precision == Precision::W8;
            let options = ExportOptions { precision, output, external_data, force: true, ..Default::default() };
            export(&generator, &info(&config), &options, &onnx).unwrap();
            let report = dmd_export::to_ort(&onnx, &ort, true, None).unwrap();
            let (difference, psnr_db) = (report.max_abs_difference, report.psnr_db);
            eprintln!("{precision} {output:?}: {difference:e}, {psnr_db:.1} dB");
            let least = if precision == Precision::Fp32 { 100.0 } else { precision.min_psnr_db() };
            assert!(psnr_db >= if output == Output::U8 { 48.13 } else { least }, "{precision} {output:?}: {psnr_db}");
            assert_eq!(dmd_runtime::Info::read(&ort).unwrap().precision, precision.name());
            let files = if external_data { 3 } else { 2 };
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), files, "something was left behind");
        }
    }
}

#[test]
fn a_file_that_no_engine_ran_is_refused_unless_that_is_allowed() {
    // A library that is none: no engine is left when only ONNX Runtime is asked for. In a process that has loaded the
    // real one already, naming another is refused as well.
    let nowhere = |options: &mut ExportOptions| {
        (options.engines, options.library) = (EngineChoice::OnnxRuntime, Some("/nowhere/libonnxruntime.so".into()));
    };
    let (error, files) = refused(|_, options| nowhere(options), "new.onnx");
    assert!(
        matches!(&error, Error::Unverified(checks) if checks.iter().any(|c| c.contains("ONNX Runtime"))),
        "{error}"
    );
    assert!(error.to_string().contains("--allow-unverified"), "{error}");
    assert_eq!(files, 1);
    let config = small(&[]);
    let folder = tempfile::tempdir().unwrap();
    let mut options = ExportOptions { allow_unverified: true, ..Default::default() };
    nowhere(&mut options);
    let generator = edm(&config, &random_weights(&config), 2.5);
    let report = export(&generator, &info(&config), &options, &folder.path().join("a.onnx")).unwrap();
    assert!(report.path.exists() && report.engines.iter().all(|v| matches!(v.status, Status::Skipped(_))));
}
