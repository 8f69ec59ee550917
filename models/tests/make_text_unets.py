#!/usr/bin/env python3
"""Makes the parity fixtures of `UNet2DConditionModel` with diffusers.

    python make_text_unets.py OUT          (OUT: models/tests/fixtures/unet2d_condition, which is replaced)
    python make_text_unets.py --full OUT   (one of the width of Stable Diffusion 1.5, 1.7 GB, for the test that is ignored)

The committed fixtures were made with diffusers 0.42.1, torch 2.15.0 (CPU, one thread), safetensors 0.8.0.

NAME/                config.json and f16 weights as `UNet2DConditionModel.save_pretrained` writes them, and io.safetensors:
                       sample        f32 [2,C,H,W]
                       timestep      f64 [2]
                       text          f32 [2,N,C], the text encoder's states
                       class_labels  i64 [2], where there is a class table, or a number is a class
                       vector        f32 [2,...], side by side: a class as a vector, pooled text, six numbers, the guidance
                                     scale; as far as the network is told these
                       output        f32, of the network in eval mode, on the weights as they are stored

The script ends by loading every folder again and comparing.
"""

import shutil
import sys
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from make_fixtures import make_network
from safetensors.torch import load_file, save_file

DOWN, CROSS_DOWN, ATTN_DOWN, RES_DOWN = "DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP, CROSS_UP, ATTN_UP, RES_UP = "UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"
SIZES = [[512.0, 640.0, 0.0, 16.0, 512.0, 512.0], [1024.0, 1024.0, 8.0, 0.0, 768.0, 1024.0]]

# Every norm has at least two channels in a group: with one, it cancels what is added before it.
NETWORKS = {
    # Stable Diffusion 1.x: convolutions around transformers, as many heads in each level, the last level without text.
    "sd15": dict(
        timestep=(440.25, 999.0),
        config=dict(
            sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=1, attention_head_dim=4, norm_num_groups=4,
            down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP, CROSS_UP),
            cross_attention_dim=12,
        ),
    ),
    # 2.x: linear projections, heads by level; both sides of the latents odd, and odd again when halved.
    "sd21": dict(
        timestep=(1.0, 981.0),
        config=dict(
            sample_size=(11, 13), block_out_channels=(8, 8, 8), layers_per_block=1, attention_head_dim=[1, 2, 4],
            norm_num_groups=4, down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP, CROSS_UP),
            cross_attention_dim=16, use_linear_projection=True, upcast_attention=True,
        ),
    ),
    # XL: more blocks further in, the first level without text, pooled text and sizes.
    "sdxl": dict(
        timestep=(20.0, 499.0),
        config=dict(
            sample_size=8, block_out_channels=(8, 8, 8), layers_per_block=1, attention_head_dim=[1, 2, 4],
            norm_num_groups=4, down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, UP),
            cross_attention_dim=20, use_linear_projection=True, transformer_layers_per_block=[1, 1, 2],
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 48,
        ),
    ),
    # BK-SDM small: one layer a level, nothing in the middle.
    "bk-sdm": dict(
        timestep=(0.0, 250.0),
        config=dict(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=8, norm_num_groups=4,
            down_block_types=(CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP), mid_block_type=None,
            cross_attention_dim=12,
        ),
    ),
    # SDXS: the same with linear projections, and the outer level without text.
    "sdxs": dict(
        timestep=(999.0, 999.0),
        config=dict(
            sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=1, attention_head_dim=[1, 2, 4],
            norm_num_groups=4, down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, UP),
            mid_block_type=None, cross_attention_dim=16, use_linear_projection=True,
        ),
    ),
    # A latent consistency model: the guidance scale is told.
    "lcm": dict(
        timestep=(259.0, 999.0), guidance=(8.5, 1.0),
        config=dict(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=4, norm_num_groups=4,
            down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP), cross_attention_dim=12,
            time_cond_proj_dim=16,
        ),
    ),
    # The x4 upscaler: the noise level of the small picture as a class, first attention to text too where the list says so.
    "upscaler": dict(
        timestep=(73.0, 500.0), labels=(4, 0),
        config=dict(
            sample_size=8, in_channels=7, block_out_channels=(8, 8, 8), layers_per_block=1, attention_head_dim=4,
            norm_num_groups=4, down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, UP),
            cross_attention_dim=16, only_cross_attention=[True, True, False], num_class_embeds=5,
            use_linear_projection=True, norm_eps=0.02,
        ),
    ),
    # What no published model of this class has together: random frequencies, resnets that resample, attention to pixels
    # alone, a middle of one resnet, projected text, a class as a vector through two layers.
    "rare": dict(
        timestep=(0.25, 3.5),
        config=dict(
            sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=1, attention_head_dim=[4, 4, 8],
            norm_num_groups=4, down_block_types=(RES_DOWN, ATTN_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, ATTN_UP, RES_UP),
            mid_block_type="UNetMidBlock2D", cross_attention_dim=12, encoder_hid_dim=10, act_fn="mish",
            time_embedding_type="fourier", time_embedding_dim=20, time_embedding_act_fn="silu", timestep_post_act="gelu",
            conv_in_kernel=5, conv_out_kernel=1, center_input_sample=True, downsample_padding=0,
            resnet_time_scale_shift="scale_shift", resnet_skip_time_act=True, resnet_out_scale_factor=1.5,
            mid_block_scale_factor=2.0, class_embed_type="projection", projection_class_embeddings_input_dim=14,
            flip_sin_to_cos=False, out_channels=3,
        ),
    ),
    # Everything that can be told at once; layers and blocks of transformers by list, another number on the way up; heads
    # that do not divide the channels.
    "told-all": dict(
        timestep=(12.0, 871.0), guidance=(3.0, 7.5), identity=True,
        config=dict(
            sample_size=(8, 12), block_out_channels=(8, 12), layers_per_block=[1, 2], attention_head_dim=[3, 5],
            norm_num_groups=4, down_block_types=(CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP),
            cross_attention_dim=[12, 12], transformer_layers_per_block=[[2], [1, 2]],
            reverse_transformer_layers_per_block=[[1, 1, 2], [1, 1]], only_cross_attention=True, act_fn="gelu",
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 + 24,
            class_embed_type="identity", time_cond_proj_dim=8, freq_shift=1, mid_block_scale_factor=1.5,
        ),
    ),
    # The other two ways of a class.
    "class-number": dict(
        timestep=(7.0, 8.0), labels=(3, 40),
        config=dict(
            sample_size=4, block_out_channels=(8,), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
            down_block_types=(CROSS_DOWN,), up_block_types=(CROSS_UP,), cross_attention_dim=8, mid_block_type=None,
            class_embed_type="timestep", act_fn="relu",
        ),
    ),
    "class-vector": dict(
        timestep=(7.0, 8.0),
        config=dict(
            sample_size=4, block_out_channels=(8,), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
            down_block_types=(CROSS_DOWN,), up_block_types=(CROSS_UP,), cross_attention_dim=8, mid_block_type=None,
            class_embed_type="simple_projection", projection_class_embeddings_input_dim=10,
        ),
    ),
}

TOKENS = 11
FULL = dict(timestep=(399.0, 981.0), config=dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8))


def conditions(spec, net):
    """What goes into io.safetensors, and the arguments that diffusers wants."""
    config, io, args, vector = net.config, {}, {}, []
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    io["sample"] = torch.randn(2, config.in_channels, height, width)
    io["timestep"] = torch.tensor(spec["timestep"], dtype=torch.float64)
    cross = config.cross_attention_dim
    text = config.encoder_hid_dim or (cross if isinstance(cross, int) else cross[0])
    io["text"] = torch.randn(2, TOKENS, text)
    if "labels" in spec:
        args["class_labels"] = io["class_labels"] = torch.tensor(spec["labels"])
    elif config.class_embed_type is not None:
        width = config.projection_class_embeddings_input_dim
        args["class_labels"] = torch.randn(2, net.time_embedding.linear_2.out_features if "identity" in spec else width)
        vector.append(args["class_labels"])
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, pooled), "time_ids": torch.tensor(SIZES)}
        args["added_cond_kwargs"] = added
        vector += added.values()
    if "guidance" in spec:
        scale = torch.tensor(spec["guidance"])
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        args["timestep_cond"] = embed(None, scale - 1, embedding_dim=config.time_cond_proj_dim)
        vector.append(scale[:, None])
    if vector:
        io["vector"] = torch.cat(vector, 1)
    return io, args


def call(net, io, args):
    return net(io["sample"], io["timestep"], io["text"], **args).sample.float().contiguous()


def write(folder, seed, spec):
    net = make_network(seed, spec["config"], True, UNet2DConditionModel)
    io, args = conditions(spec, net)
    io["output"] = call(net, io, args)
    peak, count = io["output"].abs().max().item(), sum(p.numel() for p in net.parameters())
    net.half().save_pretrained(folder)
    save_file(io, folder / "io.safetensors")
    del net
    again = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32).eval()
    error = (call(again, load_file(folder / "io.safetensors"), args) - io["output"]).abs().max().item() / peak
    assert error == 0 and 0.05 < peak < 100, (folder.name, error, peak)
    print(f"{folder.name:14} {count:9} parameters, |output| <= {peak:.3f}")


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--full":
        torch.set_num_threads(2)
        return write(Path(sys.argv[2]), 499, FULL)
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    shutil.rmtree(out, ignore_errors=True)
    for seed, (name, spec) in enumerate(NETWORKS.items(), start=500):
        write(out / name, seed, spec)
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "bytes in all")


if __name__ == "__main__":
    main()
