#!/usr/bin/env python3
"""Makes the parity fixtures of `dmd-models` for what stands around a latent model's network: autoencoders, text encoders,
tokenizers.

    python make_encoder_fixtures.py OUT    (OUT: models/tests/fixtures; its sub-folder encoders/ is replaced)

The committed fixtures were made with diffusers 0.42.1, transformers 5.24.0, torch 2.15.0 (CPU, one thread). The same versions
on the same machine give the same bytes; other ones differ in the last bits of the outputs.

encoders/autoencoders/NAME/   config.json and weights as `save_pretrained` writes them, and io.safetensors:
                       pictures  f32 [2,3,H,W] in [-1, 1]
                       mean      f32, the encoder's mean (or its only) latents, scaled as pipelines scale them
                       std       f32, their standard deviation, scaled alike (AutoencoderKL)
                       latents   f32, unit normal
                       decoded   f32, of `latents` unscaled as pipelines do
                     Weights are f16, exact; the arithmetic is f32. `old-names` has the attention's weights under the names of old files, which diffusers still reads.
encoders/clip/NAME/  config.json and weights of CLIPTextModel or CLIPTextModelWithProjection, and io.safetensors:
                       ids i64 [2,N], last f32 [2,N,C] (behind the last norm), penultimate f32 [2,N,C], pooled f32 [2,P]
encoders/pipelines/NAME/  whole pipelines (see `pipelines` below)
encoders/tokenizers/NAME/  a tokenizer of a few hundred tokens as transformers 5 writes it, and expected.json: texts and ids
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

torch.set_num_threads(1)
torch.set_grad_enabled(False)
logging.set_verbosity_error()
logging.disable_progress_bar()

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
ATTN_DOWN, ATTN_UP = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
TWO_LEVELS = dict(
    down_block_types=(DOWN, DOWN), up_block_types=(UP, UP), block_out_channels=(8, 16), layers_per_block=1,
    norm_num_groups=4, sample_size=16,
)

AUTOENCODERS = {
    # As in Stable Diffusion 1 and 2.
    "kl": (AutoencoderKL, dict(TWO_LEVELS)),
    # As in Stable Diffusion 3 and FLUX: no convolutions between the halves, a shift. Odd fields beside: another
    # non-linearity, two layers, grey pictures out of coloured ones.
    "shifted": (
        AutoencoderKL,
        dict(TWO_LEVELS, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609,
             scaling_factor=1.5305, latent_channels=6, act_fn="mish", out_channels=1, mid_block_add_attention=False),
    ),
    # A mean and a deviation for each channel; levels that attend; attention by its old names.
    "old-names": (
        AutoencoderKL,
        dict(TWO_LEVELS, down_block_types=(ATTN_DOWN, DOWN), up_block_types=(UP, ATTN_UP), scaling_factor=0.5,
             latents_mean=(-1.6, 0.7, 0.1, 0.4), latents_std=(8.4, 5.2, 9.7, 0.5)),
    ),
    "tiny": (
        AutoencoderTiny,
        dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 2, 1),
             num_decoder_blocks=(2, 1, 1)),
    ),
    # A codebook narrower than what is between the halves.
    "vq": (VQModel, dict(TWO_LEVELS, num_vq_embeddings=24, latent_channels=4, vq_embed_dim=3)),
}


def stirred(kind, config, seed):
    """A seeded network in which no norm, bias or scale keeps its trivial initial value."""
    torch.manual_seed(seed)
    net = kind(**config).eval()
    for name, p in net.named_parameters():
        p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.02))
        if name == "quantize.embedding.weight":
            p.normal_()
    return net


def autoencoders(out):
    for i, (name, (kind, config)) in enumerate(AUTOENCODERS.items()):
        net = stirred(kind, config, 300 + i).half()
        folder = out / name
        net.save_pretrained(folder)
        net.float()
        file = folder / "diffusion_pytorch_model.safetensors"
        if name == "old-names":
            old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            weights = {}
            for key, value in load_file(file).items():
                for new, before in old.items():
                    key = key.replace(f".{new}.", f".{before}.") if ".attentions." in key else key
                weights[key] = value
            save_file(weights, file, metadata={"format": "pt"})
            net = kind.from_pretrained(folder, dtype=torch.float32).eval()
        io = autoencoder_io(net)
        if name == "kl":  # small enough for the norms' eps to show
            for p in net.decoder.conv_in.parameters():
                p.mul_(1e-3)
            io["decoded_quiet"] = net.decode(io["latents"] / net.config.scaling_factor).sample.contiguous()
        save_file(io, folder / "io.safetensors")


def autoencoder_io(net):
    config = net.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    pictures = torch.rand(2, 3, 4 * factor, 6 * factor) * 2 - 1
    shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
    # As the pipeline of SDXL reads them; a pipeline that knows no shift has 0.
    by_channel = config.get("latents_mean") is not None
    mean, std = (
        torch.tensor(config[key]).view(1, -1, 1, 1) if by_channel else default
        for key, default in (("latents_mean", shift), ("latents_std", 1.0))
    )
    encoded = net.encode(pictures)
    io = {"pictures": pictures}
    if hasattr(encoded, "latent_dist"):
        io["mean"] = (encoded.latent_dist.mean - mean) * scale / std
        io["std"] = encoded.latent_dist.std * scale / std
    else:
        io["mean"] = (encoded.latents - mean) * scale
    io["latents"] = torch.randn(io["mean"].shape)
    raw = io["latents"] * std / scale + mean
    io["decoded"] = net.decode(raw).sample
    peak = io["decoded"].abs().max()
    net.double()
    wide = net.decode(raw.double()).sample
    print(f"  |decoded| <= {peak:.3f}, f32 against f64 {((wide - io['decoded']).abs().max() / peak).item():.1e}")
    net.float()
    return {key: value.contiguous() for key, value in io.items()}


# --------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, vocab_size=40, max_position_embeddings=9)

CLIPS = {
    # As the text encoder of Stable Diffusion 1: an eos_token_id that is none. The class of old configs.
    "quick": (CLIPTextModel, dict(SMALL, num_hidden_layers=3, hidden_act="quick_gelu", eos_token_id=2, projection_dim=8)),
    # As the second of SDXL, on a newer config: a token with a larger id than the end, which comes twice.
    "projected": (
        CLIPTextModelWithProjection,
        dict(SMALL, num_hidden_layers=2, hidden_act="gelu", eos_token_id=37, projection_dim=12, layer_norm_eps=1e-3),
    ),
}
# Begin 38, end 39 or 37; the second prompt is padded.
IDS = {
    "quick": [[38, 3, 2, 39, 39, 39, 39, 39, 39], [38, 1, 2, 5, 5, 6, 30, 31, 39]],
    "projected": [[38, 39, 2, 37, 0, 0, 37, 0, 0], [38, 0, 2, 5, 5, 6, 30, 31, 37]],
}


def clips(out):
    for i, (name, (kind, config)) in enumerate(CLIPS.items()):
        torch.manual_seed(400 + i)
        net = kind(CLIPTextConfig(**config)).eval()
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        net.half()
        net.save_pretrained(out / name)
        net.float()
        ids = torch.tensor(IDS[name])
        found = net(input_ids=ids, output_hidden_states=True)
        pooled = found.text_embeds if name == "projected" else found.pooler_output
        io = dict(ids=ids, last=found.last_hidden_state, penultimate=found.hidden_states[-2], pooled=pooled)
        save_file({key: value.contiguous() for key, value in io.items()}, out / name / "io.safetensors")
        wide = net.double()(input_ids=ids).last_hidden_state
        print(f"  {name}: f32 against f64 {((wide - io['last']).abs().max() / wide.abs().max()).item():.1e}")


TEXTS = [
    "a photo of a cat", "Hello,   WORLD! it's 2026 \u2014 na\u00efve caf\u00e9 \u732b \U0001f600", "wow!! great!", "",
    "x <|endoftext|> y", "a\u0000b",
    "a photo of a cat in the style of a photo of a hat, and of a cat in a photo of the cat in the hat 123456",
]
MERGES = "p h,ph o,pho t,phot o</w>,o f</w>,c a,ca t</w>,h e,he l,hel l,hell o</w>,t h,th e</w>,h a,ha t</w>".split(",")


def tokenizers(out):
    """CLIP's bytes and a few merges, with the two paddings that there are; 24 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    merges = [tuple(merge.split()) for merge in MERGES]
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("pads-with-end", "<|endoftext|>"), ("pads-with-mark", "!")):
        vocab = {token: i for i, token in enumerate(tokens)}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=24)
        tokenizer.save_pretrained(out / name)
        expected = [
            {"text": text, "ids": tokenizer(text, padding="max_length", truncation=True).input_ids} for text in TEXTS
        ]
        rows = ",\n".join(f"  {json.dumps(row)}" for row in expected)
        (out / name / "expected.json").write_text(f"[\n{rows}\n]\n")


# --------------------------------------------------------------------------------------------------------------
# Whole pipelines
# --------------------------------------------------------------------------------------------------------------

KARRAS = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True, timestep_spacing="linspace"
)
UNET = dict(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)


def text_encoder(seed, kind, **config):
    torch.manual_seed(seed)
    net = kind(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_attention_heads=4, num_hidden_layers=2, vocab_size=529,
            max_position_embeddings=24, bos_token_id=527, **config,
        )
    ).eval()
    for p in net.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    return net


def pipelines(out, tokenizers):
    """Pipelines of the smallest size, all weights f16 (the arithmetic f32), and io.safetensors: noise, latents (x0 before
    it is decoded) and picture in [-1, 1], of ten of diffusers' Euler steps on Karras's noise levels, batch 1. `sd` says
    "a photo of a cat" and not "hat", at guidance 7.5; `sdxl` the same without a negative prompt, at 5; `ldm` is
    unconditional.
    """
    end, mark = (CLIPTokenizer.from_pretrained(tokenizers / name) for name in ("pads-with-end", "pads-with-mark"))
    vae = stirred(AutoencoderKL, AUTOENCODERS["kl"][1], 500)
    scheduler = EulerDiscreteScheduler(**KARRAS)
    sd = StableDiffusionPipeline(
        vae=vae, tokenizer=end, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        text_encoder=text_encoder(501, CLIPTextModel, eos_token_id=2, hidden_act="quick_gelu"),
        unet=stirred(UNet2DConditionModel, dict(UNET, cross_attention_dim=16), 502),
        requires_safety_checker=False,
    )
    whole(sd, out / "sd", dict(prompt="a photo of a cat", negative_prompt="hat", guidance_scale=7.5))
    second = text_encoder(503, CLIPTextModelWithProjection, eos_token_id=528, hidden_act="gelu", projection_dim=12)
    xl = dict(
        UNET, cross_attention_dim=32, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=12 + 6 * 4, attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
    )
    sdxl = StableDiffusionXLPipeline(
        vae=vae, tokenizer=end, tokenizer_2=mark, scheduler=scheduler, text_encoder=sd.text_encoder, text_encoder_2=second,
        unet=stirred(UNet2DConditionModel, xl, 504), add_watermarker=False,
    )
    whole(sdxl, out / "sdxl", dict(prompt="a photo of a cat", guidance_scale=5.0))
    pixels = dict(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    ldm = LDMPipeline(
        vqvae=stirred(VQModel, AUTOENCODERS["vq"][1], 505), unet=stirred(UNet2DModel, pixels, 506),
        scheduler=DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False),
    )
    whole(ldm, out / "ldm", None)


def whole(pipe, folder, told):
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, pipe.unet.config.in_channels, 8, 8)
    if told is None:
        # Its pipeline draws the noise itself, and cannot be given Euler steps.
        euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True, timestep_spacing="linspace")
        euler.set_timesteps(10)
        latents = noise * euler.init_noise_sigma
        for t in euler.timesteps:
            latents = euler.step(pipe.unet(euler.scale_model_input(latents, t), t).sample, t, latents).prev_sample
        picture = pipe.vqvae.decode(latents / pipe.vqvae.config.scaling_factor).sample
    else:
        run = lambda **kwargs: pipe(**told, latents=noise.clone(), num_inference_steps=10, return_dict=False, **kwargs)[0]
        latents = run(output_type="latent")
        picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        shown = run(output_type="pt")
        assert (shown - (picture / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    io = dict(noise=noise, latents=latents, picture=picture)
    print(f"  {folder.name}: |latents| <= {latents.abs().max():.2f}, |picture| <= {picture.abs().max():.2f}")
    save_file({key: value.contiguous() for key, value in io.items()}, folder / "io.safetensors")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1]) / "encoders"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    autoencoders(out / "autoencoders")
    clips(out / "clip")
    tokenizers(out / "tokenizers")
    pipelines(out / "pipelines", out / "tokenizers")
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "bytes in all")


if __name__ == "__main__":
    main()
