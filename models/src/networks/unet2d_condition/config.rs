//! `config.json` of a `UNet2DConditionModel`: what each field may be here, and why the rest is refused.

use crate::blocks::Resampling;
use crate::networks::config::{self, Fields, NetworkFields};
use crate::networks::unet2d::{SampleSize, TimeEmbedding, TimeScaleShift};
use crate::networks::{Takes, Told};
use crate::{Activation, Condition, Error, Result, Way, limits};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The fields of diffusers' `UNet2DConditionModel`, with its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UNet2DConditionConfig {
    /// Height and width of a sample, in latent pixels.
    pub sample_size: Option<SampleSize>,
    /// Channels in.
    pub in_channels: usize,
    /// Channels out.
    pub out_channels: usize,
    /// Whether the network first maps x to 2x − 1.
    pub center_input_sample: bool,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Shift in the frequencies' exponent.
    pub freq_shift: f64,
    /// Block types on the way down: `CrossAttnDownBlock2D`, `DownBlock2D`, `AttnDownBlock2D`, `ResnetDownsampleBlock2D`.
    pub down_block_types: Vec<String>,
    /// `UNetMidBlock2DCrossAttn`, `UNetMidBlock2D`, or null for none.
    pub mid_block_type: Option<String>,
    /// Block types on the way up: `CrossAttnUpBlock2D`, `UpBlock2D`, `AttnUpBlock2D`, `ResnetUpsampleBlock2D`.
    pub up_block_types: Vec<String>,
    /// Whether the first attention of every transformer is to text too.
    pub only_cross_attention: PerLevel<bool>,
    /// Channels of each level.
    pub block_out_channels: Vec<usize>,
    /// Resnets per level on the way down (one more on the way up).
    pub layers_per_block: PerLevel<usize>,
    /// 1: symmetric; 0: a row and a column of zeros on the right and below.
    pub downsample_padding: usize,
    /// Residual sums of the middle's resnets are divided by this.
    pub mid_block_scale_factor: f64,
    /// In training. Distillation and sampling run without it (DMD, section 4).
    pub dropout: f64,
    /// Non-linearity of the resnets, of the time embedding and of the last norm.
    pub act_fn: Activation,
    /// Groups of every norm of maps.
    pub norm_num_groups: usize,
    /// Added to the variances of the resnets' norms and of the last.
    pub norm_eps: f64,
    /// Channels of the tokens that the transformers attend to.
    pub cross_attention_dim: PerLevel<usize>,
    /// Blocks of a transformer; of a level, or of each transformer of a level. The middle has as many as the last level.
    pub transformer_layers_per_block: PerLevel<PerLevel<usize>>,
    /// The same on the way up, in its own order, where it is another.
    pub reverse_transformer_layers_per_block: Option<Vec<PerLevel<usize>>>,
    /// Channels of a prompt's tokens, where they are projected first.
    pub encoder_hid_dim: Option<usize>,
    /// `text_proj`, which is meant too where there is a width alone.
    pub encoder_hid_dim_type: Option<String>,
    /// In spite of its name the number of heads of a transformer; the width of a head in `AttnDownBlock2D` and
    /// `AttnUpBlock2D` alone. diffusers has it so, and so have all published models.
    pub attention_head_dim: PerLevel<usize>,
    /// Whether the projections around transformers are stored as linear maps.
    pub use_linear_projection: bool,
    /// Null, or `timestep`, `identity`, `projection`, `simple_projection`.
    pub class_embed_type: Option<String>,
    /// Null, or `text_time`: pooled text and numbers (sizes and crops) are told.
    pub addition_embed_type: Option<String>,
    /// Width of the sinusoids of each of those numbers.
    pub addition_time_embed_dim: Option<usize>,
    /// Rows of the class table.
    pub num_class_embeds: Option<usize>,
    /// Scores in single precision, where others run in half. They are here always.
    pub upcast_attention: bool,
    /// How the time embedding enters a resnet.
    pub resnet_time_scale_shift: TimeScaleShift,
    /// The time embedding enters the resnets of `ResnetDownsampleBlock2D` and `ResnetUpsampleBlock2D` as it is.
    pub resnet_skip_time_act: bool,
    /// Their sums are divided by this.
    pub resnet_out_scale_factor: f64,
    /// How a timestep becomes a vector: `positional` or `fourier`.
    pub time_embedding_type: TimeEmbedding,
    /// Width of the embedding; four times the first level (twice for `fourier`) when null.
    pub time_embedding_dim: Option<usize>,
    /// Non-linearity of the whole embedding, of time and what else is told.
    pub time_embedding_act_fn: Option<Activation>,
    /// Non-linearity after the time embedding's last layer.
    pub timestep_post_act: Option<Activation>,
    /// Width of the sinusoids of the guidance scale, where it is told (latent consistency models).
    pub time_cond_proj_dim: Option<usize>,
    /// Side of the first convolution's kernel.
    pub conv_in_kernel: usize,
    /// And of the last.
    pub conv_out_kernel: usize,
    /// Width of what `class_embed_type` `projection` and `addition_embed_type` `text_time` project.
    pub projection_class_embeddings_input_dim: Option<usize>,
}

impl Default for UNet2DConditionConfig {
    fn default() -> Self {
        let types = |block: &str, at: usize| {
            (0..4).map(|i| format!("{}{block}Block2D", if i == at { "" } else { "CrossAttn" })).collect()
        };
        UNet2DConditionConfig {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: types("Down", 3),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            up_block_types: types("Up", 0),
            only_cross_attention: PerLevel::All(false),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::All(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            dropout: 0.0,
            act_fn: Activation::Silu,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerLevel::All(1280),
            transformer_layers_per_block: PerLevel::All(PerLevel::All(1)),
            reverse_transformer_layers_per_block: None,
            encoder_hid_dim: None,
            encoder_hid_dim_type: None,
            attention_head_dim: PerLevel::All(8),
            use_linear_projection: false,
            class_embed_type: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            num_class_embeds: None,
            upcast_attention: false,
            resnet_time_scale_shift: TimeScaleShift::Default,
            resnet_skip_time_act: false,
            resnet_out_scale_factor: 1.0,
            time_embedding_type: TimeEmbedding::Positional,
            time_embedding_dim: None,
            time_embedding_act_fn: None,
            timestep_post_act: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            projection_class_embeddings_input_dim: None,
        }
    }
}

/// One for all levels (layers), or one for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value, or a list of them")]
pub enum PerLevel<T> {
    /// In their order.
    Each(Vec<T>),
    /// The same.
    All(T),
}

impl<T> PerLevel<T> {
    /// That of a level.
    pub fn get(&self, level: usize) -> Option<&T> {
        match self {
            PerLevel::Each(values) => values.get(level),
            PerLevel::All(value) => Some(value),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        match self {
            PerLevel::Each(values) => values.iter(),
            PerLevel::All(value) => std::slice::from_ref(value).iter(),
        }
    }

    /// Refuses a list for another number of levels.
    fn check(&self, name: &str, levels: usize) -> Result<()> {
        match self {
            PerLevel::Each(values) if values.len() != levels => Err(Error::Config(format!(
                "{name} has {} entries, block_out_channels {levels}: they must be as many",
                values.len()
            ))),
            _ => Ok(()),
        }
    }
}

/// What the two class fields mean together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClassEmbedding {
    None,
    /// Rows of a table.
    Table(usize),
    /// Sinusoids of a number through two layers.
    Timestep,
    /// A vector of the embedding's width, as it is.
    Identity,
    /// A vector of this width through two layers.
    Projection(usize),
    /// And through one.
    SimpleProjection(usize),
}

/// The parts of what is told as one vector, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Parts {
    /// A class as a vector.
    pub class: usize,
    /// Pooled text.
    pub pooled: usize,
    /// Sizes and crops.
    pub numbers: usize,
    /// The guidance scale.
    pub guidance: usize,
}

impl Parts {
    pub fn width(self) -> usize {
        let Parts { class, pooled, numbers, guidance } = self;
        class + pooled + numbers + guidance
    }
}

/// Height and width of the picture that was trained on, of its crop's corner, and of the picture to be made.
const NUMBERS: usize = 6;

/// What a block's type name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockKind {
    /// Resnets alone.
    Plain,
    /// Attention to pixels.
    Attn,
    /// Transformers.
    CrossAttn,
    /// Resnets that resample too.
    Resnet,
}

impl BlockKind {
    pub fn resampling(self) -> Resampling {
        if self == BlockKind::Resnet { Resampling::Resnet } else { Resampling::Conv }
    }

    fn of(field: &str, name: &str, way: &str) -> Result<Self> {
        // diffusers drops this prefix of old files too.
        let plain = name.strip_prefix("UNetRes").unwrap_or(name);
        let resampling = format!("Resnet{way}sampleBlock2D");
        match plain.strip_suffix(&format!("{way}Block2D")) {
            Some("") => Ok(BlockKind::Plain),
            Some("Attn") => Ok(BlockKind::Attn),
            Some("CrossAttn") => Ok(BlockKind::CrossAttn),
            _ if plain == resampling => Ok(BlockKind::Resnet),
            _ => Err(Error::Config(format!(
                "{field} holds {name}, which is not supported (only CrossAttn{way}Block2D, {way}Block2D, Attn{way}Block2D, {resampling})"
            ))),
        }
    }
}

impl UNet2DConditionConfig {
    /// Reads the text of `config.json`; what this network does not compute is refused by name.
    pub fn from_json(path: &std::path::Path, text: &str) -> Result<Self> {
        config::from_json(path, text)
    }

    pub(super) fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    pub(super) fn down_block(&self, i: usize) -> Result<BlockKind> {
        BlockKind::of("down_block_types", self.down_block_types.get(i).map_or("", |name| name), "Down")
    }

    pub(super) fn up_block(&self, i: usize) -> Result<BlockKind> {
        BlockKind::of("up_block_types", self.up_block_types.get(i).map_or("", |name| name), "Up")
    }

    /// Blocks of a transformer: one of level `i`, counted along `way`.
    pub(super) fn transformer_layers(&self, i: usize, layer: usize, up: bool) -> Result<usize> {
        let of_level = match &self.reverse_transformer_layers_per_block {
            Some(reversed) if up => reversed.get(i),
            _ if up => self.transformer_layers_per_block.get(self.levels() - 1 - i),
            _ => self.transformer_layers_per_block.get(i),
        };
        of_level.and_then(|layers| layers.get(layer)).copied().ok_or_else(|| {
            let field = if up { "reverse_transformer_layers_per_block" } else { "transformer_layers_per_block" };
            Error::Config(format!("{field} has no number for layer {layer} of block {i}"))
        })
    }

    /// Whether a level attends to text.
    fn attends(&self, level: usize) -> bool {
        let is = |kind: Result<BlockKind>| matches!(kind, Ok(BlockKind::CrossAttn));
        let middle = level + 1 == self.levels() && self.mid_block_type.as_deref() == Some("UNetMidBlock2DCrossAttn");
        is(self.down_block(level)) || is(self.up_block(self.levels() - 1 - level)) || middle
    }

    /// Channels of the tokens that its transformers read; none where it has none.
    pub(super) fn attended(&self) -> Option<usize> {
        (0..self.levels())
            .find(|level| self.attends(*level))
            .and_then(|level| self.cross_attention_dim.get(level).copied())
    }

    /// Width of the time embedding.
    pub(super) fn time_dim(&self) -> usize {
        let per_channel = if self.time_embedding_type == TimeEmbedding::Fourier { 2 } else { 4 };
        self.time_embedding_dim.unwrap_or(per_channel * self.block_out_channels[0])
    }

    /// Width of a timestep before any learned layer.
    pub(super) fn time_width(&self) -> usize {
        if self.time_embedding_type == TimeEmbedding::Fourier { self.time_dim() } else { self.block_out_channels[0] }
    }

    pub(super) fn class_embedding(&self) -> ClassEmbedding {
        let projected = self.projection_class_embeddings_input_dim.unwrap_or(0);
        match (self.class_embed_type.as_deref(), self.num_class_embeds) {
            (Some("timestep"), _) => ClassEmbedding::Timestep,
            (Some("projection"), _) => ClassEmbedding::Projection(projected),
            (Some("simple_projection"), _) => ClassEmbedding::SimpleProjection(projected),
            (Some(_), _) => ClassEmbedding::Identity,
            (None, Some(n)) => ClassEmbedding::Table(n),
            (None, None) => ClassEmbedding::None,
        }
    }

    /// What is told as one vector.
    pub(super) fn parts(&self) -> Parts {
        let class = match self.class_embedding() {
            ClassEmbedding::Identity => self.time_dim(),
            ClassEmbedding::Projection(width) | ClassEmbedding::SimpleProjection(width) => width,
            _ => 0,
        };
        let joined = self.addition_embed_type.as_ref().and(self.projection_class_embeddings_input_dim);
        let pooled = joined.map(|joined| joined.saturating_sub(NUMBERS * self.addition_time_embed_dim.unwrap_or(0)));
        Parts {
            class,
            pooled: pooled.unwrap_or(0),
            numbers: if pooled.is_some() { NUMBERS } else { 0 },
            guidance: usize::from(self.time_cond_proj_dim.is_some()),
        }
    }

    /// Height and width, where the config states them.
    pub fn size(&self) -> Option<[usize; 2]> {
        self.sample_size.map(|size| match size {
            SampleSize::Square(side) => [side, side],
            SampleSize::Rectangle(size) => size,
        })
    }

    /// Limits of every number that sizes something.
    fn check_limits(&self) -> Result<()> {
        limits::check("levels of block_out_channels", self.levels(), limits::LEVELS)?;
        let widths = [
            ("in_channels", Some(self.in_channels)),
            ("out_channels", Some(self.out_channels)),
            ("norm_num_groups", Some(self.norm_num_groups)),
            ("time_embedding_dim", self.time_embedding_dim),
            ("encoder_hid_dim", self.encoder_hid_dim),
            ("addition_time_embed_dim", self.addition_time_embed_dim),
            ("time_cond_proj_dim", self.time_cond_proj_dim),
            ("projection_class_embeddings_input_dim", self.projection_class_embeddings_input_dim),
        ];
        let lists = [
            ("block_out_channels", self.block_out_channels.clone()),
            ("cross_attention_dim", self.cross_attention_dim.iter().copied().collect()),
            ("attention_head_dim", self.attention_head_dim.iter().copied().collect()),
        ];
        let lists = lists.iter().flat_map(|(name, values)| values.iter().map(move |value| (*name, *value)));
        for (name, value) in widths.into_iter().filter_map(|(name, value)| Some((name, value?))).chain(lists) {
            limits::check(name, value, limits::CHANNELS)?;
        }
        let both =
            self.transformer_layers_per_block.iter().chain(self.reverse_transformer_layers_per_block.iter().flatten());
        let layers = both.flat_map(PerLevel::iter).map(|n| ("transformer_layers_per_block", *n));
        for (name, value) in self.layers_per_block.iter().map(|n| ("layers_per_block", *n)).chain(layers) {
            limits::check(name, value, limits::LAYERS)?;
        }
        for (name, kernel) in [("conv_in_kernel", self.conv_in_kernel), ("conv_out_kernel", self.conv_out_kernel)] {
            limits::check(name, kernel, limits::KERNEL)?;
            if kernel.is_multiple_of(2) {
                return Err(Error::Config(format!(
                    "{name} is {kernel}, expected an odd number: an even one shrinks the sample"
                )));
            }
        }
        self.num_class_embeds.map_or(Ok(()), |rows| limits::check("num_class_embeds", rows, limits::ROWS))?;
        self.size().into_iter().flatten().try_for_each(|side| limits::check("sample_size", side, limits::SIDE))
    }

    /// What the time, the class and what is added to them need.
    fn check_embeddings(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Config(message));
        let half = self.block_out_channels[0] / 2;
        match self.time_embedding_type {
            TimeEmbedding::Learned => {
                return refuse("time_embedding_type is learned, supported: positional, fourier".into());
            }
            TimeEmbedding::Fourier if !self.time_dim().is_multiple_of(2) => {
                return refuse(format!(
                    "time_embedding_dim is {}, which time_embedding_type fourier needs even",
                    self.time_dim()
                ));
            }
            TimeEmbedding::Positional if half == 0 || self.freq_shift >= half as f64 => {
                return refuse(format!(
                    "freq_shift is {}, expected below {half} (half of the first block's channels)",
                    self.freq_shift
                ));
            }
            _ => {}
        }
        match self.class_embed_type.as_deref() {
            None | Some("identity") => {}
            Some("timestep")
                if self.time_embedding_type == TimeEmbedding::Positional
                    && self.block_out_channels[0].is_multiple_of(2) => {}
            Some("timestep") => {
                return refuse(
                    "class_embed_type is timestep, which needs time_embedding_type positional and an even first block"
                        .into(),
                );
            }
            Some("projection" | "simple_projection") if self.projection_class_embeddings_input_dim.is_some() => {}
            Some("projection" | "simple_projection") => {
                return refuse("class_embed_type needs projection_class_embeddings_input_dim".into());
            }
            Some(other) => {
                return refuse(format!(
                    "class_embed_type is {other}, supported: null, timestep, identity, projection, simple_projection"
                ));
            }
        }
        match (
            self.addition_embed_type.as_deref(),
            self.addition_time_embed_dim,
            self.projection_class_embeddings_input_dim,
        ) {
            (None, ..) => {}
            (Some("text_time"), Some(each), Some(joined)) if each.is_multiple_of(2) && joined > NUMBERS * each => {}
            (Some("text_time"), ..) => {
                return refuse(format!(
                    "addition_embed_type is text_time, which needs an even addition_time_embed_dim, and a projection_class_embeddings_input_dim of more than {NUMBERS} times as many"
                ));
            }
            (Some(other), ..) => {
                return refuse(format!(
                    "addition_embed_type is {other}, supported: null, text_time (the others are told pictures)"
                ));
            }
        }
        if self.time_cond_proj_dim.is_some_and(|width| width < 4 || !width.is_multiple_of(2)) {
            return refuse("time_cond_proj_dim must be even, and 4 at least".into());
        }
        match (self.encoder_hid_dim_type.as_deref(), self.encoder_hid_dim) {
            (None, _) | (Some("text_proj"), Some(_)) => Ok(()),
            (Some("text_proj"), None) => {
                refuse("encoder_hid_dim_type is text_proj, which needs encoder_hid_dim".into())
            }
            (Some(other), _) => refuse(format!(
                "encoder_hid_dim_type is {other}, supported: null, text_proj (the others are told pictures)"
            )),
        }
    }

    /// Whether a sample of this size comes out as large as it went in. The way up meets an odd side of the way down, but
    /// not where padding lies on one side or resnets resample: diffusers fails there.
    pub fn check_size(&self, [height, width]: [usize; 2]) -> Result<()> {
        let factor = 1usize.checked_shl(self.levels() as u32 - 1).unwrap_or(usize::MAX);
        let halved = height.is_multiple_of(factor) && width.is_multiple_of(factor);
        let kinds = (0..self.levels()).flat_map(|i| [self.down_block(i), self.up_block(i)]);
        let meets_odd =
            self.downsample_padding == 1 && kinds.into_iter().all(|kind| !matches!(kind, Ok(BlockKind::Resnet)));
        if halved || meets_odd {
            return Ok(());
        }
        Err(Error::Config(format!(
            "a sample of {height}x{width} cannot be halved {} times: with downsample_padding 0, and with resnets that resample, both sides must be multiples of {factor}",
            self.levels() - 1
        )))
    }
}

impl Fields for UNet2DConditionConfig {
    const CLASSES: &'static [&'static str] = &["UNet2DConditionModel"];
    // These belong to blocks that are refused (SimpleCrossAttn) and to addition_embed_type text.
    const WITHOUT_EFFECT: &'static [&'static str] =
        &["cross_attention_norm", "mid_block_only_cross_attention", "addition_embed_type_num_heads"];

    fn fixed() -> Vec<(&'static str, Vec<Value>)> {
        vec![
            // diffusers itself refuses any other.
            ("num_attention_heads", vec![Value::Null]),
            ("dual_cross_attention", vec![json!(false)]),
            ("class_embeddings_concat", vec![json!(false)]),
            ("attention_type", vec![json!("default")]),
        ]
    }

    fn validate(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::Config(message));
        self.check_limits()?;
        let levels = self.levels();
        for (name, types) in [("down_block_types", &self.down_block_types), ("up_block_types", &self.up_block_types)] {
            PerLevel::Each(types.iter().collect()).check(name, levels)?;
        }
        self.only_cross_attention.check("only_cross_attention", levels)?;
        self.layers_per_block.check("layers_per_block", levels)?;
        self.cross_attention_dim.check("cross_attention_dim", levels)?;
        self.attention_head_dim.check("attention_head_dim", levels)?;
        self.transformer_layers_per_block.check("transformer_layers_per_block", levels)?;
        if let Some(reversed) = &self.reverse_transformer_layers_per_block {
            PerLevel::Each(reversed.iter().collect()).check("reverse_transformer_layers_per_block", levels)?;
        }
        for i in 0..levels {
            let (layers, down, up) =
                (self.layers_per_block.get(i).copied().unwrap_or(0), self.down_block(i)?, self.up_block(i)?);
            if down == BlockKind::CrossAttn {
                (0..layers).try_for_each(|layer| self.transformer_layers(i, layer, false).map(drop))?;
            }
            if up == BlockKind::CrossAttn {
                let layers = self.layers_per_block.get(levels - 1 - i).copied().unwrap_or(0) + 1;
                (0..layers).try_for_each(|layer| self.transformer_layers(i, layer, true).map(drop))?;
            }
        }
        match self.mid_block_type.as_deref() {
            None | Some("UNetMidBlock2DCrossAttn" | "UNetMidBlock2D") => {}
            Some(other) => {
                return refuse(format!(
                    "mid_block_type is {other}, supported: UNetMidBlock2DCrossAttn, UNetMidBlock2D, null"
                ));
            }
        }
        let attended: Vec<Option<&usize>> =
            (0..levels).filter(|level| self.attends(*level)).map(|level| self.cross_attention_dim.get(level)).collect();
        if attended.windows(2).any(|pair| pair[0] != pair[1]) {
            return refuse(
                "cross_attention_dim is not the same in all levels that attend to text, and a text has one width"
                    .into(),
            );
        }
        if self.encoder_hid_dim.is_some() && attended.is_empty() {
            return refuse("encoder_hid_dim projects text, and no block attends to it".into());
        }
        if self.downsample_padding > 1 {
            return refuse(format!(
                "downsample_padding is {}, supported: 0 and 1 (others do not halve the picture)",
                self.downsample_padding
            ));
        }
        let divisors = [
            ("mid_block_scale_factor", self.mid_block_scale_factor),
            ("resnet_out_scale_factor", self.resnet_out_scale_factor),
        ];
        if let Some((name, value)) = divisors.into_iter().find(|(_, value)| !value.is_finite() || *value == 0.0) {
            return refuse(format!("{name} is {value}, expected a number other than zero"));
        }
        if self.norm_eps.is_nan() || self.norm_eps <= 0.0 {
            return refuse(format!("norm_eps is {}, expected a positive number", self.norm_eps));
        }
        self.check_embeddings()?;
        self.size().map_or(Ok(()), |size| self.check_size(size))
    }

    fn to_fields(&self) -> Result<Map<String, Value>> {
        let mut fields = config::fields(self)?;
        if self.freq_shift.fract() == 0.0 {
            fields.insert("freq_shift".into(), (self.freq_shift as i64).into());
        }
        Ok(fields)
    }
}

impl NetworkFields for UNet2DConditionConfig {
    const PART: &'static str = "unet";
    const LANDMARK: &'static str = "conv_in.weight";

    fn takes(&self) -> Takes {
        let label = match self.class_embedding() {
            ClassEmbedding::Table(n) => Some(Told::Id(Some(n))),
            ClassEmbedding::Timestep => Some(Told::Id(None)),
            _ => None,
        };
        let text = self.attended().map(|attended| Told::Tokens(self.encoder_hid_dim.unwrap_or(attended)));
        let vector = Some(self.parts().width()).filter(|width| *width > 0).map(|width| Told::Values(vec![width]));
        let ways = [(Way::Label, label), (Way::Text, text), (Way::Vector, vector)];
        let told: Condition<Told> = ways.into_iter().filter_map(|(way, told)| Some((way, told?))).collect();
        Takes { channels: self.in_channels, size: self.size(), told }
    }

    fn why_no_model(&self) -> Option<String> {
        if self.in_channels != self.out_channels {
            return Some(format!(
                "in_channels {} and out_channels {} differ: a denoiser returns what it takes (networks for inpainting and upscaling are not supported)",
                self.in_channels, self.out_channels
            ));
        }
        None
    }

    fn pipeline(&self, _scheduler: &str) -> &'static str {
        match (&self.addition_embed_type, self.time_cond_proj_dim) {
            (Some(_), _) => "StableDiffusionXLPipeline",
            (None, Some(_)) => "LatentConsistencyModelPipeline",
            (None, None) => "StableDiffusionPipeline",
        }
    }
}
