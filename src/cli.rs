//! Command-line types only; what they do is under `commands`.

use crate::config::Recipe;
use crate::device::Choice;
use crate::sample::Sampler;
use clap::{Args, Parser, Subcommand};
use dmd_export::lint::Target;
use dmd_export::{Dialect, Precision};
use std::path::PathBuf;

/// Distil a diffusion model into a one-step generator and export it for edge devices.
#[derive(Debug, Parser)]
#[command(name = "dmd", version, arg_required_else_help = true)]
pub struct Cli {
    /// Print one machine-readable result object on stdout, and nothing else there.
    #[arg(long, global = true)]
    pub json: bool,
    /// Print warnings, errors and results only.
    #[arg(long, global = true)]
    pub quiet: bool,
    /// CPU threads, at most four for each core (default: all cores).
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a teacher: a many-step diffusion model.
    #[command(subcommand)]
    Teacher(TeacherCommand),
    /// Train an autoencoder, whose latents a teacher can learn in the place of pictures.
    #[command(subcommand)]
    Autoencoder(AutoencoderCommand),
    /// Distil a teacher into a one-step generator.
    Distill(DistillArgs),
    /// Make noise-picture pairs of a teacher, for the regression term.
    Pairs(PairsArgs),
    /// The settings of a distillation, and what they mean.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Write a generator as an ONNX file and verify it.
    Export(ExportArgs),
    /// Make pictures with a teacher, a generator or an ONNX file.
    Sample(SampleArgs),
    /// Score a model's pictures against real ones, or another model's.
    Score(ScoreArgs),
    /// Say what a file or folder of ours holds.
    Inspect(InspectArgs),
    /// Say which nodes of an ONNX file an accelerator takes, and why it refuses the others.
    Lint(LintArgs),
    /// Make a model folder of a whole model in one file, as Stable Diffusion 1, 2 and XL are shared, or such a file of a folder.
    Convert(ConvertArgs),
    /// Write an exported file in ONNX Runtime's own format, for its minimal builds.
    Ort(OrtArgs),
    /// Compile an exported file for Qualcomm's Hexagon ahead, so that an app need not when it starts.
    Compile(CompileArgs),
    /// Time training, or an exported file.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Draw one step of a picture model at several noise levels: the sample, both scores' answers, the gradient.
    Ablate(AblateArgs),
    /// Print what a shell needs to complete the command line, as `dmd completions bash > ~/.local/share/bash-completion/completions/dmd`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Distil, export and run the small model that comes with the project, and show it all in one picture.
    Demo(DemoArgs),
}

/// What can be done with a teacher.
#[derive(Debug, Subcommand)]
pub enum TeacherCommand {
    /// Train one from a folder or zip of pictures (PNG, JPEG, WebP, GIF, BMP, TIFF …); nested folders are classes.
    Train(TeacherTrainArgs),
}

/// `dmd teacher train`.
#[derive(Debug, Args)]
pub struct TeacherTrainArgs {
    /// The pictures: a folder or a zip.
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// Where the model folder goes; running the same command again continues.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Settings as TOML; options here override it.
    #[arg(long, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// Side of the pictures in pixels, or HEIGHTxWIDTH [default: 32].
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub size: Option<[usize; 2]>,
    /// One channel instead of three.
    #[arg(long)]
    pub grey: bool,
    /// Folders are not classes.
    #[arg(long)]
    pub unconditional: bool,
    /// The network: a UNet2DModel's config.json, a UNet2DConditionModel's for text [default: one that goes with the size].
    #[arg(long, value_name = "CONFIG.json")]
    pub unet: Option<PathBuf>,
    /// An autoencoder (a vae/) whose latents are learned in the place of pictures.
    #[arg(long, value_name = "DIR")]
    pub decoder: Option<PathBuf>,
    /// Learn captions in the place of classes: of captions.jsonl, metadata.jsonl or metadata.csv, or a .txt beside each picture.
    #[arg(long)]
    pub text: bool,
    /// What reads captions: a CLIP text encoder's config.json, learned along, or a model folder, whose text encoder stays as
    /// it is [default: a small one, learned along].
    #[arg(long, value_name = "CONFIG.json|DIR")]
    pub text_encoder: Option<PathBuf>,
    /// Tokens of the vocabulary that is learned from the captions [default: 2000].
    #[arg(long, value_name = "N")]
    pub vocabulary: Option<usize>,
    /// Updates [default: 10000].
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Pictures per update [default: 64].
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Parts that a batch is run in, to save memory; the gradient is that of the whole batch [default: 1].
    #[arg(long, value_name = "N")]
    pub accumulate: Option<usize>,
    /// Compute the network's blocks again for their gradient instead of keeping them: slower, in less memory.
    #[arg(long)]
    pub grad_checkpoint: bool,
    /// What the network computes in on a GPU; f32 multiplies in TF32 [default: f32].
    #[arg(long, value_name = "f32|bf16")]
    pub precision: Option<dmd_models::Precision>,
    /// Seed of everything random [default: 0].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Learning rate [default: 0.001].
    #[arg(long, value_name = "RATE")]
    pub rate: Option<f64>,
    /// Mirror half of the pictures.
    #[arg(long)]
    pub flip: bool,
    /// Fraction of pictures shown without their class or caption, so that the teacher can be guided [default: 0].
    #[arg(long, value_name = "P")]
    pub label_dropout: Option<f64>,
    /// Refuse the data when one picture cannot be read, instead of leaving it out.
    #[arg(long)]
    pub strict: bool,
    /// Source and licence of the pictures, recorded in the model.
    #[arg(long, value_name = "TEXT")]
    pub about_data: Option<String>,
    /// Where to train.
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda[:N]")]
    pub device: Choice,
    /// Begin anew over what is in --out.
    #[arg(long)]
    pub force: bool,
}

/// What can be done with an autoencoder.
#[derive(Debug, Subcommand)]
pub enum AutoencoderCommand {
    /// Train one from a folder or zip of pictures: AutoencoderKL, or AutoencoderTiny.
    Train(AutoencoderTrainArgs),
}

/// `dmd autoencoder train`.
#[derive(Debug, Args)]
pub struct AutoencoderTrainArgs {
    /// The pictures: a folder or a zip.
    #[arg(long, value_name = "DIR|FILE.zip")]
    pub data: PathBuf,
    /// Where the autoencoder goes, as it lies in a model folder's vae/; running the same command again continues.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Settings as TOML; options here override it.
    #[arg(long, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// Side of the pictures in pixels, or HEIGHTxWIDTH [default: 64].
    #[arg(long, value_name = "N", value_parser = parse_size)]
    pub size: Option<[usize; 2]>,
    /// One channel instead of three.
    #[arg(long)]
    pub grey: bool,
    /// AutoencoderKL, or AutoencoderTiny, which is a fraction of the work [default: kl].
    #[arg(long)]
    pub kind: Option<crate::autoencoder::Kind>,
    /// Its config.json [default: one of the kind, with four channels of latents of a quarter of the side].
    #[arg(long, value_name = "CONFIG.json")]
    pub network: Option<PathBuf>,
    /// An ONNX network that compares pictures beside the pixels, such as LPIPS.
    #[arg(long, value_name = "FILE.onnx")]
    pub perceptual: Option<PathBuf>,
    /// Updates [default: 10000].
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Pictures per update [default: 32].
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Parts that a batch is run in, to save memory; the gradient is that of the whole batch [default: 1].
    #[arg(long, value_name = "N")]
    pub accumulate: Option<usize>,
    /// Seed of everything random [default: 0].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Learning rate [default: 0.001].
    #[arg(long, value_name = "RATE")]
    pub rate: Option<f64>,
    /// Mirror half of the pictures.
    #[arg(long)]
    pub flip: bool,
    /// Refuse the data when one picture cannot be read, instead of leaving it out.
    #[arg(long)]
    pub strict: bool,
    /// Source and licence of the pictures, recorded in the autoencoder.
    #[arg(long, value_name = "TEXT")]
    pub about_data: Option<String>,
    /// Where to train.
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda[:N]")]
    pub device: Choice,
    /// Begin anew over what is in --out.
    #[arg(long)]
    pub force: bool,
}

/// `dmd distill`.
#[derive(Debug, Args)]
pub struct DistillArgs {
    /// The teacher: a diffusers folder.
    #[arg(long, value_name = "DIR")]
    pub teacher: PathBuf,
    /// The run's folder; running the same command again continues.
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
    /// What to change of the defaults.
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// Where to train.
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda[:N]")]
    pub device: Choice,
    /// Begin anew over what is in --out.
    #[arg(long)]
    pub force: bool,
}

/// The settings of a distillation: a recipe, a file and single settings, each on top of the one before.
#[derive(Clone, Debug, Default, Args)]
pub struct SettingsArgs {
    /// Settings that belong together; everything else is on top of them.
    #[arg(long, value_name = "NAME", default_value = "sid", value_enum)]
    pub recipe: Recipe,
    /// Settings as TOML, on top of the recipe; options here override it.
    #[arg(long, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// One setting, such as loss.gan.weight=1e-3; `dmd config show` lists them all. May be repeated.
    ///
    /// `dmd config show` prints every key below its meaning, the values it takes and the paper it is from. The groups:
    /// the run (steps, batch, accumulate, grad_checkpoint, precision, seed, ratio, samples fresh or shared, data, prompts,
    /// log_every, sample_every, checkpoint_every); generator (sigma, steps or timestep, start, rate, warmup, decay, ema,
    /// t_range); real_score (guidance_scale, negative, rescale); fake_score (rate, warmup, decay, weight, t_range,
    /// guidance_scale, dropout, pull); loss (scores, divergence, ratio_memory, floor, regression: weight, distance, pairs; gan: weight, critic_weight, r1, start_step,
    /// resolutions, t_range); guards (skip, returns); optimizer (betas, weight_decay, eps, clip).
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Updates of the generator [default: 1000].
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Samples per update [default: 32].
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Compute the networks' blocks again for their gradient instead of keeping them: slower, in less memory.
    #[arg(long)]
    pub grad_checkpoint: bool,
    /// What the networks compute in on a GPU; f32 multiplies in TF32 [default: f32].
    #[arg(long, value_name = "f32|bf16")]
    pub precision: Option<dmd_models::Precision>,
    /// Seed of everything random [default: 0].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Pictures for the adversarial term: a folder or a zip.
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Prompts for a teacher of text, one a line.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// What a teacher of text is guided away from [default: nothing].
    #[arg(long, value_name = "TEXT")]
    pub negative: Option<String>,
    /// Pairs for the regression term, made by `dmd pairs`.
    #[arg(long, value_name = "PAIRS")]
    pub pairs: Option<PathBuf>,
    /// Another run, or its generator, to go on from.
    #[arg(long, value_name = "RUN")]
    pub start: Option<PathBuf>,
    /// Guidance of the real score: uncond + SCALE·(cond − uncond); 1 is none [default: 1].
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f64>,
}

/// `dmd pairs`.
#[derive(Debug, Args)]
pub struct PairsArgs {
    /// The teacher.
    pub teacher: PathBuf,
    /// The folder to write; running the same command again goes on.
    #[arg(long, value_name = "PAIRS")]
    pub out: PathBuf,
    /// Number of pairs.
    #[arg(short, default_value_t = 10_000, value_name = "N")]
    pub n: usize,
    /// Steps of Heun's sampler.
    #[arg(long, default_value_t = 18, value_name = "N")]
    pub steps: usize,
    /// Guidance, as the distillation's will be; 1 is none.
    #[arg(long, default_value_t = 1.0, value_name = "SCALE")]
    pub guidance: f64,
    /// Prompts for a teacher of text, one a line: those that the distillation will have.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// What a teacher of text is guided away from [default: nothing].
    #[arg(long, value_name = "TEXT")]
    pub negative: Option<String>,
    /// Seed of the noise, and of the labels or prompts.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// Pictures per pass.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub batch: usize,
    /// Pairs per file.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub per_shard: usize,
    /// Where the teacher runs.
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda[:N]")]
    pub device: Choice,
    /// Begin anew over what is in --out.
    #[arg(long)]
    pub force: bool,
}

/// What can be done with settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print them as TOML, every setting below its meaning, ready to be edited and given to --config.
    Show(SettingsArgs),
}

/// `dmd export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A generator's folder, or the run that made it.
    pub generator: PathBuf,
    /// The file to write; of a model of several parts (text encoder, generator, decoder) the folder.
    #[arg(long, value_name = "FILE|DIR")]
    pub onnx: PathBuf,
    /// Operators that the file is spelled in: portable for most engines, nnapi for Android's, native for opset 21.
    #[arg(long, default_value = "portable", value_name = "portable|nnapi|native")]
    pub dialect: Dialect,
    /// How numbers are stored and computed: fp16 halves the file, w8 (8-bit weights) quarters it, w8a8 also computes
    /// in 8 bits.
    /// [default: fp32, or what suits the --target]
    #[arg(long, value_name = "fp32|fp16|w8|w8a8")]
    pub precision: Option<Precision>,
    /// Least PSNR against fp32 that is accepted of other precisions [default: 60 for fp16, 40 for w8, 30 for w8a8].
    #[arg(long, value_name = "DB")]
    pub min_psnr: Option<f64>,
    /// How far w8a8 may fall below w8, in PSNR; the worst layers stay in fp32 until it does not [default: 10].
    #[arg(long, value_name = "DB")]
    pub max_drop_db: Option<f64>,
    /// Put the weights into FILE.data, aligned to be mapped.
    #[arg(long)]
    pub external_data: bool,
    /// Refuse to write more than this: bytes, or a number with kB or MB.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub max_size: Option<usize>,
    /// Which engines verify the file; auto is every one that is present.
    #[arg(long, default_value = "auto", value_enum)]
    pub engine: Engine,
    /// Write the file even if no engine is present to run it.
    #[arg(long)]
    pub allow_unverified: bool,
    /// The accelerator that it is for: picks dialect and precision, and says which nodes the accelerator takes.
    #[arg(long, value_name = TARGETS, conflicts_with = "dialect")]
    pub target: Option<Target>,
    /// Pictures per pass, fixed in the file.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub batch: usize,
    /// Leave the number of pictures per pass free; no other axis ever is.
    #[arg(long, conflicts_with = "batch")]
    pub dynamic_batch: bool,
    /// Fold one class in: the file then takes noise alone.
    #[arg(long, value_name = "NAME|INDEX")]
    pub fixed_label: Option<String>,
    /// Make one prompt part of the file: no text encoder, no tokenizer, noise alone.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompts", "fixed_label"])]
    pub fixed_prompt: Option<String>,
    /// Make the prompts of a text file, one a line, part of the file, to be chosen from: no text encoder, no tokenizer.
    #[arg(long, value_name = "FILE", conflicts_with = "fixed_label")]
    pub prompts: Option<PathBuf>,
    /// Another decoder of the latents: a diffusers folder of an autoencoder, or a file of TAESD.
    #[arg(long, value_name = "PATH")]
    pub decoder: Option<PathBuf>,
    /// Take a model as it is, not distilled here, as a generator held at --sigma or --timestep.
    #[arg(long, requires = "level")]
    pub as_generator: bool,
    /// Noise level of --as-generator.
    #[arg(long, value_name = "S", requires = "as_generator", group = "level")]
    pub sigma: Option<f64>,
    /// The same as an index into the model's noise levels: 999 for most models of others that make a picture in one step.
    #[arg(long, value_name = "N", requires = "as_generator", group = "level")]
    pub timestep: Option<usize>,
    /// f32: (B, C, H, W) around ±1; u8: (B, H, W, C) bytes.
    #[arg(long, default_value = "f32", value_name = "f32|u8")]
    pub output: OutputKind,
    /// Compare the file with the network on 256 noises: FILE.report.json, and FILE.report.html with pictures.
    #[arg(long)]
    pub report: bool,
    /// Replace an existing file.
    #[arg(long)]
    pub force: bool,
}

impl ExportArgs {
    /// What the command line means without options.
    pub fn plain(generator: PathBuf, onnx: PathBuf) -> Self {
        ExportArgs {
            generator,
            onnx,
            dialect: Dialect::default(),
            precision: None,
            min_psnr: None,
            max_drop_db: None,
            external_data: false,
            max_size: None,
            engine: Engine::Auto,
            allow_unverified: false,
            target: None,
            batch: 1,
            dynamic_batch: false,
            fixed_label: None,
            as_generator: false,
            fixed_prompt: None,
            prompts: None,
            decoder: None,
            sigma: None,
            timestep: None,
            output: OutputKind::F32,
            report: false,
            force: false,
        }
    }
}

/// What an exported file returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputKind {
    /// Floats in [-1, 1].
    F32,
    /// Bytes.
    U8,
}

/// `dmd sample`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// A teacher's folder, a generator's folder, a run or an .onnx file.
    pub model: PathBuf,
    /// The grid to write; its ending says in which format.
    #[arg(long, value_name = "GRID.png")]
    pub out: Option<PathBuf>,
    /// Write single pictures of their own size, in folders named like the classes, as `teacher train --data` takes them.
    #[arg(long, value_name = "DIR")]
    pub pictures: Option<PathBuf>,
    /// Write the raw samples, f32 (N, C, H, W).
    #[arg(long, value_name = "FILE.npy")]
    pub npy: Option<PathBuf>,
    /// Number of pictures [default: 16, or one for each prompt, or as many as --noise holds].
    #[arg(short, value_name = "N")]
    pub n: Option<usize>,
    /// Seed of the noise; picture i of a seed is the same in every model and batch.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Class by name or index, or `all` for each in turn.
    #[arg(long, default_value = "all", value_name = "NAME|INDEX|all")]
    pub class: String,
    /// What a model of text is told; given several times, each in turn.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// The same from a file, one prompt a line.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// What a teacher of text is guided away from [default: nothing].
    #[arg(long, value_name = "TEXT")]
    pub negative: Option<String>,
    /// Height and width of the pictures of a folder's model [default: its own].
    #[arg(long, value_name = "N|HxW", value_parser = parse_size)]
    pub size: Option<[usize; 2]>,
    /// Write what a latent model makes before it is decoded, f32 (N, C, H, W).
    #[arg(long, value_name = "FILE.npy")]
    pub latents: Option<PathBuf>,
    /// Sampler of a teacher [default: heun].
    #[arg(long, value_enum)]
    pub sampler: Option<Sampler>,
    /// Steps of a teacher's sampler [default: 18].
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Classifier-free guidance of a teacher trained with label dropout or told text: uncond + SCALE·(cond − uncond)
    /// [default: 1, none; of text 7.5, or 5 for SDXL; what a latent consistency model is told: 8.5].
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f64>,
    /// Noise to start from instead of a seed: f32 (N, C, H, W), unit normal; of a latent model's latents.
    #[arg(long, value_name = "FILE.npy", conflicts_with = "seed")]
    pub noise: Option<PathBuf>,
    /// Pictures per pass of a folder's model [default: 64].
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Where a folder's model runs [default: auto].
    #[arg(long, value_name = "auto|cpu|cuda[:N]")]
    pub device: Option<Choice>,
    /// What runs an .onnx file [default: auto].
    #[arg(long, value_enum)]
    pub engine: Option<Engine>,
    /// Replace existing files.
    #[arg(long)]
    pub force: bool,
}

/// What runs an .onnx file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// ONNX Runtime where its library is found, else tract.
    Auto,
    /// ONNX Runtime.
    Onnxruntime,
    /// tract, built in.
    Tract,
}

/// `dmd score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// A teacher's folder, a generator's folder, a run or an .onnx file.
    pub model: PathBuf,
    /// What to compare its pictures with: a folder or zip of pictures, or another model. May be repeated.
    #[arg(long, value_name = "PATH", required = true)]
    pub against: Vec<PathBuf>,
    /// Pictures of each, at most; scores of different numbers do not compare.
    #[arg(short, default_value_t = 2048, value_name = "N")]
    pub n: usize,
    /// What the kernel distance (KID) and the Fréchet distance (FID) look with: a model folder's encoder, or an ONNX network
    /// such as an Inception. FILE.toml beside FILE.onnx says what it is fed; docs/recipes.md has the keys.
    #[arg(long, value_name = "PATH")]
    pub features: Option<PathBuf>,
    /// Guidance of the teachers among the models [default: 1, none].
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f64>,
    /// Prompts for models of text, one a line, in turn.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Seed of the noise. The model and a reference that is a model get each their own, which neither `sample` nor `pairs`
    /// nor training draws from any seed.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Where the models of folders run [default: auto].
    #[arg(long, value_name = "auto|cpu|cuda[:N]")]
    pub device: Option<Choice>,
}

/// `dmd inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A model folder, a run, an .onnx file, a .safetensors file.
    pub path: PathBuf,
}

/// `dmd lint`.
#[derive(Debug, Args)]
pub struct LintArgs {
    /// Any ONNX file.
    pub onnx: PathBuf,
    /// The accelerator.
    #[arg(long, value_name = TARGETS)]
    pub target: Target,
}

const TARGETS: &str = "coreml|nnapi|qnn|xnnpack|directml|webgpu|tensorrt|cpu";

/// `dmd convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A .safetensors file in the original layout (tensors model.diffusion_model.…), or a diffusers folder.
    pub model: PathBuf,
    /// The folder, or the .safetensors file, to write.
    pub out: PathBuf,
    /// Take configs, tokenizers, scheduler and parts that the file lacks from this diffusers folder, which is of the same
    /// architecture.
    #[arg(long, value_name = "FOLDER")]
    pub like: Option<PathBuf>,
    /// What the network predicts, where the file does not say: Stable Diffusion 2 is told as v_prediction.
    #[arg(long, value_name = "KIND", value_parser = ["epsilon", "v_prediction"])]
    pub prediction: Option<String>,
    /// Replace what is at OUT.
    #[arg(long)]
    pub force: bool,
}

/// `dmd ort`.
#[derive(Debug, Args)]
pub struct OrtArgs {
    /// An exported file.
    pub onnx: PathBuf,
    /// The file to write.
    #[arg(long, value_name = "FILE.ort")]
    pub out: PathBuf,
    /// List the operators that a minimal build has to contain, for ONNX Runtime's build.py --include_ops_by_config.
    #[arg(long, value_name = "FILE")]
    pub required_operators: Option<PathBuf>,
    /// Replace existing files.
    #[arg(long)]
    pub force: bool,
}

/// `dmd compile`.
#[derive(Debug, Args)]
pub struct CompileArgs {
    /// An exported file.
    pub onnx: PathBuf,
    /// Qualcomm's plug-in of ONNX Runtime, of Python's package onnxruntime-qnn, by an absolute path.
    #[arg(long, value_name = "LIBRARY")]
    pub qnn: PathBuf,
    /// The chip, by Qualcomm's number: 57 is the Snapdragon 8 Gen 3.
    #[arg(long, value_name = "N")]
    pub qnn_soc: u32,
    /// Hexagon's architecture in it [default: that of the chip].
    #[arg(long, value_name = "N")]
    pub qnn_arch: Option<u32>,
    /// The folder that gets what is compiled, for `Qnn::cache` of dmd-runtime. It may hold what was compiled of other files.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// What can be timed.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// The work of one distillation iteration, step by step.
    Train(BenchTrainArgs),
    /// One pass of an exported file.
    Run(BenchRunArgs),
}

/// `dmd bench train`.
#[derive(Debug, Args)]
pub struct BenchTrainArgs {
    /// The network: a UNet2DModel's config.json.
    #[arg(long, value_name = "CONFIG.json")]
    pub unet: PathBuf,
    /// Samples per update.
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub batch: usize,
    /// Updates of the fake score per iteration.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub ratio: u64,
    /// Timed repetitions; each figure is their median.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub steps: usize,
    /// Compute the networks' blocks again for their gradient, as in `distill`.
    #[arg(long)]
    pub grad_checkpoint: bool,
    /// What the networks compute in on a GPU, as in `distill`.
    #[arg(long, default_value = "f32", value_name = "f32|bf16")]
    pub precision: dmd_models::Precision,
    /// Where to run.
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda[:N]")]
    pub device: Choice,
}

/// `dmd bench run`.
#[derive(Debug, Args)]
pub struct BenchRunArgs {
    /// An exported file.
    pub onnx: PathBuf,
    /// Timed calls.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub runs: usize,
    /// What runs it on the processor.
    #[arg(long, default_value = "auto", value_enum)]
    pub engine: Engine,
    /// An accelerator, as often as there are: each is timed in a process of its own. `cpu`, `openvino:DEVICE`, `xnnpack`,
    /// `coreml`, `nnapi`, `directml:N`, `cuda:N`, `tensorrt:N`, and plug-ins `webgpu=LIBRARY`, `qnn=LIBRARY`,
    /// `openvino=LIBRARY`, `custom=LIBRARY`, options behind commas [default: cpu].
    #[arg(long, value_name = "NAME")]
    pub accelerator: Vec<String>,
    /// Numbers of threads, each timed in a process of its own [default: that of --threads].
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    pub thread_counts: Vec<usize>,
    /// Load the file so that ONNX Runtime holds less memory, for more time.
    #[arg(long)]
    pub low_memory: bool,
    /// Draw how the times of the calls are spread.
    #[arg(long, value_name = "FILE.png|svg")]
    pub plot: Option<PathBuf>,
    /// Replace an existing plot.
    #[arg(long)]
    pub force: bool,
}

/// `dmd ablate`.
#[derive(Debug, Args)]
pub struct AblateArgs {
    /// The teacher's folder.
    #[arg(long, value_name = "DIR")]
    pub teacher: PathBuf,
    /// Its generator's folder [default: that of --run, else the teacher's own samples].
    #[arg(long, value_name = "DIR")]
    pub generator: Option<PathBuf>,
    /// A distillation's run, whose last checkpoint has the fake score [default: the teacher, as a run begins].
    #[arg(long, value_name = "RUN")]
    pub run: Option<PathBuf>,
    /// Prompts for a teacher of text, one a line, of which the first are shown [default: those of --run].
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Where the picture goes.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Replace an existing picture.
    #[arg(long)]
    pub force: bool,
}

/// `dmd demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where the demo's run, file and picture go.
    #[arg(long, default_value = "target/demo", value_name = "DIR")]
    pub out: PathBuf,
    /// The teacher.
    #[arg(long, default_value = "models/pretrained/emoji-16", value_name = "DIR")]
    pub teacher: PathBuf,
    /// Updates of the generator.
    #[arg(long, default_value_t = 300, value_name = "N")]
    pub steps: u64,
}

pub use crate::config::WrongUsage;

fn parse_size(text: &str) -> Result<[usize; 2], String> {
    let side = |text: &str| text.parse::<usize>().map_err(|_| format!("size \"{text}\", expected N or HEIGHTxWIDTH"));
    match text.split_once('x') {
        None => side(text).map(|n| [n, n]),
        Some((height, width)) => Ok([side(height)?, side(width)?]),
    }
}

fn parse_bytes(text: &str) -> Result<usize, String> {
    let (number, unit) = match text.find(|c: char| c.is_ascii_alphabetic()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(format!("size \"{text}\", expected bytes, or a number with kB, MB or GB")),
    };
    let number: f64 = number.trim().parse().map_err(|_| format!("size \"{text}\", expected a number"))?;
    if number > 0.0 { Ok((number * factor) as usize) } else { Err(format!("size \"{text}\", expected more than 0")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        assert_eq!(parse_size("16"), Ok([16, 16]));
        assert_eq!(parse_size("24x32"), Ok([24, 32]));
        assert!(parse_size("x").is_err());
        assert_eq!([parse_bytes("900"), parse_bytes("1.5MB"), parse_bytes("2kb")], [Ok(900), Ok(1_500_000), Ok(2000)]);
        assert!(["", "MB", "-1", "3 parsec"].iter().all(|text| parse_bytes(text).is_err()));
    }
}
