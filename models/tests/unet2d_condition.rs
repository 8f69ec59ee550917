//! The text-conditional UNet against diffusers: same weights, same input, outputs made by `make_text_unets.py` with diffusers
//! 0.42.

use candle_core::{DType, Device, Tensor, Var};
use dmd_models::networks::config::NetworkFields;
use dmd_models::networks::unet2d_condition::{UNet2DCondition, UNet2DConditionConfig};
use dmd_models::networks::{Network, Told};
use dmd_models::{Architecture, Condition, Eager, Training, Way, Weights, cost};
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/unet2d_condition")
}

fn names() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(fixtures()).unwrap();
    let mut names: Vec<_> = folders.map(|e| e.unwrap().path()).collect();
    names.sort();
    names
}

fn config(name: impl AsRef<Path>) -> UNet2DConditionConfig {
    let path = fixtures().join(name).join("config.json");
    UNet2DConditionConfig::from_json(&path, &std::fs::read_to_string(&path).unwrap()).unwrap()
}

fn weights(name: impl AsRef<Path>) -> Weights {
    let file = fixtures().join(name).join("diffusion_pytorch_model.safetensors");
    Weights::load(&file, &Device::Cpu).unwrap().to(DType::F32, &Device::Cpu).unwrap()
}

fn net(name: impl AsRef<Path>) -> UNet2DCondition {
    UNet2DCondition::new(&config(&name), &weights(&name)).unwrap()
}

struct Io {
    x: Tensor,
    t: Vec<f64>,
    cond: Condition<Tensor>,
    output: Tensor,
}

fn io(name: impl AsRef<Path>) -> Io {
    let io = Weights::load(&fixtures().join(name).join("io.safetensors"), &Device::Cpu).unwrap();
    let ways = [(Way::Label, "class_labels"), (Way::Text, "text"), (Way::Vector, "vector")];
    let ways = ways.iter().filter(|(way, name)| *way != Way::Label || io.get(name).is_some_and(|t| t.rank() == 1));
    Io {
        x: io.get("sample").unwrap().clone(),
        t: io.get("timestep").unwrap().to_vec1().unwrap(),
        cond: ways.filter_map(|(way, name)| Some((*way, io.get(name)?.clone()))).collect(),
        output: io.get("output").unwrap().clone(),
    }
}

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// Odd sides, every way of being told, every kind of block among them (see the script).
#[test]
fn outputs_equal_those_of_diffusers() {
    assert!(names().len() >= 11);
    for name in names() {
        let io = io(&name);
        let output = net(&name).forward(&Eager, &io.x, &io.t, &io.cond).unwrap();
        let gap = largest(&(&output - &io.output).unwrap()) / largest(&io.output);
        println!("{}: {gap:.2e} of the output's maximum", name.display());
        assert!(gap <= 1e-5, "{}: {gap}", name.display());
    }
}

/// The width of Stable Diffusion 1.5: `make_text_unets.py --full DIR` makes the network, `DMD_SD15=DIR` says where it is.
#[test]
#[ignore = "takes a network of 860 million parameters, and 5 GB of memory"]
fn the_output_of_a_full_network_equals_that_of_diffusers() {
    let folder = PathBuf::from(std::env::var_os("DMD_SD15").expect("DMD_SD15, the folder that the script made"));
    let (net, io) = (net(&folder), io(&folder));
    let began = std::time::Instant::now();
    let output = net.forward(&Eager, &io.x, &io.t, &io.cond).unwrap();
    let gap = largest(&(&output - &io.output).unwrap()) / largest(&io.output);
    println!("{gap:.2e} of the output's maximum; {:.2?} for two samples", began.elapsed());
    assert!(gap <= 2e-5, "{gap}");
}

/// Of weights, of the sample and of text and vectors, which an encoder may have made.
#[test]
fn every_way_of_training_gives_the_same_gradients() {
    for name in names() {
        let (config, io) = (config(&name), io(&name));
        let run = |training: &Training| {
            let (view, vars) = weights(&name).trainable().unwrap();
            let x = Var::from_tensor(&io.x).unwrap();
            let told: Vec<(Way, Var)> = [Way::Text, Way::Vector]
                .into_iter()
                .filter_map(|way| Some((way, Var::from_tensor(io.cond.get(way)?).unwrap())))
                .collect();
            let labels = io.cond.get(Way::Label).map(|labels| (Way::Label, labels.clone()));
            let cond = told.iter().map(|(way, var)| (*way, var.as_tensor().clone())).chain(labels).collect();
            let y = UNet2DCondition::new(&config, &view).unwrap().forward(training, &x, &io.t, &cond).unwrap();
            let grads = training.backward(&(y * &io.output).unwrap().sum_all().unwrap()).unwrap();
            let frozen = |name: &str| name == "time_proj.weight";
            let all = vars.iter().filter(|(name, _)| !frozen(name)).map(|(_, var)| var);
            let all = all.chain([&x]).chain(told.iter().map(|(_, var)| var));
            all.map(|var| grads.get(var).expect("a gradient reaches everything").clone()).collect::<Vec<Tensor>>()
        };
        let plain = run(&Training::default());
        for (checkpoint, tape) in [(true, false), (false, true), (true, true)] {
            let training = Training::new(Default::default(), checkpoint);
            let found = run(&if tape { training.on_tape() } else { training });
            for (found, plain) in found.iter().zip(&plain) {
                let gap = largest(&(found - plain).unwrap());
                assert!(gap <= 1e-4 * largest(plain).max(1.0), "{}: {gap} of {}", name.display(), largest(plain));
            }
        }
    }
}

/// The slope along the gradient of a prompt's states, against a central difference of the output.
#[test]
fn the_gradient_of_text_is_its_slope() {
    let (net, io) = (net("sd15"), io("sd15"));
    let text = io.cond.get(Way::Text).unwrap();
    let loss = |text: &Tensor| {
        let y = net.forward(&Eager, &io.x, &io.t, &Condition::of(Way::Text, text.clone())).unwrap();
        (y * &io.output).unwrap().sum_all().unwrap()
    };
    let var = Var::from_tensor(text).unwrap();
    let grad = loss(var.as_tensor()).backward().unwrap().get(&var).unwrap().clone();
    let direction = grad.sign().unwrap();
    let slope: f32 = (grad * &direction).unwrap().sum_all().unwrap().to_scalar().unwrap();
    let at = |step: f64| loss(&(text + (&direction * step).unwrap()).unwrap()).to_scalar::<f32>().unwrap();
    let measured = (at(1e-2) - at(-1e-2)) / 2e-2;
    assert!((measured - slope).abs() <= 0.02 * slope, "{slope} by backward, {measured} by difference");
}

#[test]
fn maps_are_those_of_every_level_and_the_bottleneck() {
    let (net, io) = (net("bk-sdm"), io("bk-sdm"));
    let shapes = |maps: &[Tensor]| maps.iter().map(|map| map.dims().to_vec()).collect::<Vec<_>>();
    let maps = net.features(&Eager, &io.x, &io.t, &io.cond).unwrap();
    assert_eq!(shapes(&maps), [[2, 8, 8, 8], [2, 16, 4, 4]]);
}

#[test]
fn a_fresh_network_predicts_nothing() {
    let config = config("sdxl");
    let weights = UNet2DCondition::init(&config, &mut |_, n| (0..n).map(|i| (i % 7) as f64 / 7.0).collect()).unwrap();
    let Io { x, t, cond, .. } = io("sdxl");
    let net = UNet2DCondition::new(&config, &weights).unwrap();
    assert_eq!(largest(&net.forward(&Eager, &x, &t, &cond).unwrap()), 0.0);
}

/// Counted by PyTorch on the published configurations (diffusers 0.42.1 on its meta device), and by hand for one pass.
#[test]
fn full_networks_have_the_parameters_that_diffusers_counts() {
    let count = |text: &str| {
        let config = UNet2DConditionConfig::from_json(Path::new("config.json"), text).unwrap();
        let mut counter = Counter::default();
        UNet2DCondition::build(&config, &mut counter).unwrap();
        (counter.parameters, counter.tensors)
    };
    let sd15 = r#"{"cross_attention_dim": 768, "sample_size": 64, "attention_head_dim": 8}"#;
    assert_eq!(count(sd15), (859_520_964, 686));
    let sd21 = r#"{"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": true}"#;
    assert_eq!(count(sd21), (865_910_724, 686));
    let sdxl = r#"{"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": true,
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}"#;
    assert_eq!(count(sdxl), (2_567_463_684, 1680));
    let lcm = r#"{"cross_attention_dim": 768, "attention_head_dim": 8, "time_cond_proj_dim": 256}"#;
    assert_eq!(count(lcm), (859_602_884, 687));
    let bk_small =
        r#"{"cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 1, "mid_block_type": null}"#;
    assert_eq!(count(bk_small), (482_346_884, 396));
    let bk_tiny = r#"{"cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 1, "mid_block_type": null,
        "block_out_channels": [320, 640, 1280], "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;
    assert_eq!(count(bk_tiny), (323_384_964, 358));
}

/// Counts what a network asks for, and holds nothing.
#[derive(Default)]
struct Counter {
    parameters: usize,
    tensors: usize,
}

impl dmd_models::layers::Source for Counter {
    fn tensor(&mut self, _: &str, shape: &[usize], _: dmd_models::layers::Init) -> dmd_models::Result<Tensor> {
        self.parameters += shape.iter().product::<usize>();
        self.tensors += 1;
        Ok(Tensor::zeros(1, DType::F32, &Device::Cpu)?.broadcast_as(shape)?)
    }
}

#[test]
fn the_cost_is_counted_with_text_and_vectors() {
    for name in names() {
        let config = config(&name);
        let [height, width] = config.size().unwrap();
        let network = Network::UNet2DCondition(net(&name));
        let cost = cost::cost(&network, [config.in_channels, height, width]).unwrap();
        assert!(cost.flops > 0.0 && cost.between < cost.activations, "{}: {cost:?}", name.display());
    }
}

#[test]
fn what_is_told_is_told_by_its_shape() {
    let told = |name: &str| config(name).takes().told.iter().map(|(way, told)| (way, told.clone())).collect::<Vec<_>>();
    assert_eq!(told("sd15"), [(Way::Text, Told::Tokens(12))]);
    assert_eq!(told("sdxl"), [(Way::Text, Told::Tokens(20)), (Way::Vector, Told::Values(vec![12 + 6]))]);
    assert_eq!(told("lcm"), [(Way::Text, Told::Tokens(12)), (Way::Vector, Told::Values(vec![1]))]);
    assert_eq!(told("upscaler"), [(Way::Label, Told::Id(Some(5))), (Way::Text, Told::Tokens(16))]);
    assert_eq!(told("rare")[0], (Way::Text, Told::Tokens(10)));
    let (net, io) = (net("sdxl"), io("sdxl"));
    let refusal = |cond: &Condition<Tensor>| net.forward(&Eager, &io.x, &io.t, cond).map(drop).unwrap_err().to_string();
    assert_eq!(refusal(&Condition::none()), "this network needs a text");
    let text = io.cond.get(Way::Text).unwrap().clone();
    assert_eq!(refusal(&Condition::of(Way::Text, text.clone())), "this network needs a vector");
    let narrow =
        [(Way::Text, text.narrow(2, 0, 19).unwrap()), (Way::Vector, io.cond.get(Way::Vector).unwrap().clone())];
    let expected = "a text of shape [11, 19] a sample, and this network takes [tokens, 20]";
    assert_eq!(refusal(&narrow.into_iter().collect()), expected);
}

#[test]
fn what_is_not_computed_is_refused_by_its_key() {
    let refused = |fields: &str, part: &str| {
        let error = UNet2DConditionConfig::from_json(Path::new("config.json"), fields).unwrap_err().to_string();
        assert!(error.contains(part), "expected {part:?} in {error}");
    };
    refused(r#"{"num_attention_heads": 8}"#, "num_attention_heads is 8");
    refused(r#"{"dual_cross_attention": true}"#, "dual_cross_attention is true");
    refused(r#"{"attention_type": "gated"}"#, "attention_type is \"gated\"");
    refused(r#"{"class_embeddings_concat": true}"#, "class_embeddings_concat is true");
    refused(r#"{"encoder_hid_dim_type": "image_proj"}"#, "encoder_hid_dim_type is image_proj");
    refused(r#"{"encoder_hid_dim_type": "text_proj"}"#, "needs encoder_hid_dim");
    refused(r#"{"addition_embed_type": "text"}"#, "addition_embed_type is text, supported: null, text_time");
    refused(r#"{"addition_embed_type": "text_time"}"#, "needs an even addition_time_embed_dim");
    refused(r#"{"class_embed_type": "projection"}"#, "needs projection_class_embeddings_input_dim");
    refused(
        r#"{"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}"#,
        "mid_block_type is UNetMidBlock2DSimpleCrossAttn",
    );
    refused(
        r#"{"down_block_types": ["KDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]}"#,
        "down_block_types holds KDownBlock2D",
    );
    refused(r#"{"down_block_types": ["DownBlock2D"]}"#, "down_block_types has 1 entries, block_out_channels 4");
    refused(r#"{"attention_head_dim": [5, 10]}"#, "attention_head_dim has 2 entries");
    refused(r#"{"transformer_layers_per_block": [[1], [1], [1], [1]]}"#, "transformer_layers_per_block has no number");
    refused(r#"{"cross_attention_dim": [8, 8, 16, 8]}"#, "cross_attention_dim is not the same");
    refused(r#"{"time_embedding_type": "learned"}"#, "time_embedding_type is learned");
    refused(r#"{"conv_in_kernel": 4}"#, "conv_in_kernel is 4, expected an odd number");
    refused(r#"{"sample_size": 31, "downsample_padding": 0}"#, "31x31 cannot be halved 3 times");
    refused(r#"{"norm_num_groups": null}"#, "norm_num_groups is null");
    refused(r#"{"cross_atention_dim": 768}"#, "did you mean \"cross_attention_dim\"");
    refused(r#"{"layers_per_block": "two"}"#, "layers_per_block is \"two\"");
    let crowded = r#"{"attention_head_dim": 400, "cross_attention_dim": 8}"#;
    let config = UNet2DConditionConfig::from_json(Path::new("config.json"), crowded).unwrap();
    let error = UNet2DCondition::build(&config, &mut Counter::default()).unwrap_err().to_string();
    assert!(error.contains("320 channels for 400 heads: attention_head_dim is their number"), "{error}");
}
