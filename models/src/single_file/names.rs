//! Names of the same tensors in the layout of the models' first authors (CompVis' latent-diffusion, OpenCLIP) and in
//! diffusers' and transformers'. One list of pairs, read in either direction.

use std::collections::BTreeMap;

/// Pairs of an original name and ours, each the beginning of several tensors' names.
#[derive(Default)]
pub(super) struct Names(Vec<[String; 2]>);

/// One direction of it.
pub(super) struct Renaming(BTreeMap<String, String>);

impl Names {
    /// To diffusers' names.
    pub fn to_diffusers(&self) -> Renaming {
        Renaming(self.0.iter().map(|[original, ours]| (original.clone(), ours.clone())).collect())
    }

    /// To the original ones.
    pub fn to_original(&self) -> Renaming {
        Renaming(self.0.iter().map(|[original, ours]| (ours.clone(), original.clone())).collect())
    }

    fn add(&mut self, original: impl Into<String>, ours: impl Into<String>) {
        self.0.push([original.into(), ours.into()]);
    }

    fn add_inner(&mut self, original: &str, ours: &str, inner: &[[&str; 2]]) {
        inner.iter().for_each(|[theirs, here]| self.add(format!("{original}.{theirs}"), format!("{ours}.{here}")));
    }
}

impl Renaming {
    /// The other name of a tensor, if its beginning is one of the list.
    pub fn of(&self, name: &str) -> Option<String> {
        let mut end = name.len();
        loop {
            if let Some(other) = self.0.get(&name[..end]) {
                return Some(format!("{other}{}", &name[end..]));
            }
            end = name[..end].rfind('.')?;
        }
    }
}

const UNET_RESNET: [[&str; 2]; 6] = [
    ["in_layers.0", "norm1"],
    ["in_layers.2", "conv1"],
    ["emb_layers.1", "time_emb_proj"],
    ["out_layers.0", "norm2"],
    ["out_layers.3", "conv2"],
    ["skip_connection", "conv_shortcut"],
];

/// `UNet2DConditionModel` of `layers` resnets a level; `attends` says of each level whether it has transformers.
pub(super) fn unet(layers: usize, attends: &[bool]) -> Names {
    let (mut names, levels) = (Names::default(), attends.len());
    for [original, ours] in [
        ["time_embed.0", "time_embedding.linear_1"],
        ["time_embed.2", "time_embedding.linear_2"],
        ["label_emb.0.0", "add_embedding.linear_1"],
        ["label_emb.0.2", "add_embedding.linear_2"],
        ["input_blocks.0.0", "conv_in"],
        ["middle_block.1", "mid_block.attentions.0"],
        ["out.0", "conv_norm_out"],
        ["out.2", "conv_out"],
    ] {
        names.add(original, ours);
    }
    for (original, ours) in [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")] {
        names.add_inner(original, ours, &UNET_RESNET);
    }
    for (level, &attends) in attends.iter().enumerate() {
        let first = 1 + level * (layers + 1);
        for layer in 0..layers {
            let (original, ours) = (format!("input_blocks.{}", first + layer), format!("down_blocks.{level}"));
            names.add_inner(&format!("{original}.0"), &format!("{ours}.resnets.{layer}"), &UNET_RESNET);
            if attends {
                names.add(format!("{original}.1"), format!("{ours}.attentions.{layer}"));
            }
        }
        if level + 1 < levels {
            let at = first + layers;
            names.add(format!("input_blocks.{at}.0.op"), format!("down_blocks.{level}.downsamplers.0.conv"));
        }
    }
    for (block, &attends) in attends.iter().rev().enumerate() {
        let (first, ours) = (block * (layers + 1), format!("up_blocks.{block}"));
        for layer in 0..=layers {
            let original = format!("output_blocks.{}", first + layer);
            names.add_inner(&format!("{original}.0"), &format!("{ours}.resnets.{layer}"), &UNET_RESNET);
            if attends {
                names.add(format!("{original}.1"), format!("{ours}.attentions.{layer}"));
            }
        }
        if block + 1 < levels {
            let (at, place) = (first + layers, 1 + usize::from(attends));
            names.add(format!("output_blocks.{at}.{place}.conv"), format!("{ours}.upsamplers.0.conv"));
        }
    }
    names
}

const DECODER_RESNET: [[&str; 2]; 5] =
    [["norm1", "norm1"], ["conv1", "conv1"], ["norm2", "norm2"], ["conv2", "conv2"], ["nin_shortcut", "conv_shortcut"]];
const DECODER_ATTENTION: [[&str; 2]; 5] =
    [["norm", "group_norm"], ["q", "to_q"], ["k", "to_k"], ["v", "to_v"], ["proj_out", "to_out.0"]];

/// `AutoencoderKL` of this many levels, of `layers` resnets each on the way down.
pub(super) fn autoencoder(levels: usize, layers: usize) -> Names {
    let mut names = Names::default();
    for name in ["quant_conv", "post_quant_conv"] {
        names.add(name, name);
    }
    for half in ["encoder", "decoder"] {
        for [original, ours] in [["conv_in", "conv_in"], ["norm_out", "conv_norm_out"], ["conv_out", "conv_out"]] {
            names.add(format!("{half}.{original}"), format!("{half}.{ours}"));
        }
        for (original, ours) in [("mid.block_1", "resnets.0"), ("mid.block_2", "resnets.1")] {
            names.add_inner(&format!("{half}.{original}"), &format!("{half}.mid_block.{ours}"), &DECODER_RESNET);
        }
        let (original, ours) = (format!("{half}.mid.attn_1"), format!("{half}.mid_block.attentions.0"));
        names.add_inner(&original, &ours, &DECODER_ATTENTION);
    }
    for level in 0..levels {
        // The original decoder counts its levels as the encoder does, finest first.
        let block = levels - 1 - level;
        let (down, down_block) = (format!("encoder.down.{level}"), format!("encoder.down_blocks.{level}"));
        let (up, up_block) = (format!("decoder.up.{level}"), format!("decoder.up_blocks.{block}"));
        for layer in 0..layers {
            names.add_inner(
                &format!("{down}.block.{layer}"),
                &format!("{down_block}.resnets.{layer}"),
                &DECODER_RESNET,
            );
        }
        for layer in 0..=layers {
            names.add_inner(&format!("{up}.block.{layer}"), &format!("{up_block}.resnets.{layer}"), &DECODER_RESNET);
        }
        names.add(format!("{down}.downsample.conv"), format!("{down_block}.downsamplers.0.conv"));
        names.add(format!("{up}.upsample.conv"), format!("{up_block}.upsamplers.0.conv"));
    }
    names
}

const OPEN_CLIP_BLOCK: [[&str; 2]; 5] = [
    ["ln_1", "layer_norm1"],
    ["ln_2", "layer_norm2"],
    ["mlp.c_fc", "mlp.fc1"],
    ["mlp.c_proj", "mlp.fc2"],
    ["attn.out_proj", "self_attn.out_proj"],
];

/// OpenCLIP's text transformer of so many blocks, without what is stored otherwise: the joined projections of its
/// attention ([`JOINED`]) and the projection of its output, which is transposed.
pub(super) fn open_clip(blocks: usize) -> Names {
    let mut names = Names::default();
    for [original, ours] in [
        ["token_embedding", "text_model.embeddings.token_embedding"],
        ["positional_embedding", "text_model.embeddings.position_embedding.weight"],
        ["ln_final", "text_model.final_layer_norm"],
    ] {
        names.add(original, ours);
    }
    for block in 0..blocks {
        let (original, ours) = (format!("transformer.resblocks.{block}"), format!("text_model.encoder.layers.{block}"));
        names.add_inner(&original, &ours, &OPEN_CLIP_BLOCK);
    }
    names
}

/// What OpenCLIP joins: query, key and value, above each other.
pub(super) const JOINED: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

#[cfg(test)]
mod tests {
    use super::*;

    /// Tensors of Stable Diffusion 1.5 and XL, in their published files and in their diffusers folders.
    #[test]
    fn published_names_are_each_others() {
        let sd15 = unet(2, &[true, true, true, false]);
        let sdxl = unet(2, &[false, true, true]);
        let decoder = autoencoder(4, 2);
        for (names, original, ours) in [
            (&sd15, "input_blocks.1.1.proj_in.weight", "down_blocks.0.attentions.0.proj_in.weight"),
            (&sd15, "input_blocks.3.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
            (&sd15, "input_blocks.11.0.in_layers.2.weight", "down_blocks.3.resnets.1.conv1.weight"),
            (&sd15, "output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
            (&sd15, "output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
            (&sd15, "output_blocks.11.0.skip_connection.weight", "up_blocks.3.resnets.2.conv_shortcut.weight"),
            (
                &sdxl,
                "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
                "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight",
            ),
            (&sdxl, "output_blocks.2.2.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
            (&sdxl, "label_emb.0.2.bias", "add_embedding.linear_2.bias"),
            (&decoder, "decoder.up.3.block.2.conv1.weight", "decoder.up_blocks.0.resnets.2.conv1.weight"),
            (&decoder, "decoder.up.1.upsample.conv.weight", "decoder.up_blocks.2.upsamplers.0.conv.weight"),
            (&decoder, "encoder.mid.attn_1.proj_out.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
            (
                &decoder,
                "encoder.down.2.block.0.nin_shortcut.weight",
                "encoder.down_blocks.2.resnets.0.conv_shortcut.weight",
            ),
            (&open_clip(2), "transformer.resblocks.1.mlp.c_fc.bias", "text_model.encoder.layers.1.mlp.fc1.bias"),
        ] {
            assert_eq!(names.to_diffusers().of(original).as_deref(), Some(ours), "{original}");
            assert_eq!(names.to_original().of(ours).as_deref(), Some(original), "{ours}");
        }
        assert_eq!(sd15.to_diffusers().of("input_blocks.12.0.in_layers.0.weight"), None);
    }
}
