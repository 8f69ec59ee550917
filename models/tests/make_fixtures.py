#!/usr/bin/env python3
"""Makes the parity fixtures of `dmd-models` with diffusers: networks, schedulers, whole folders.

    python make_fixtures.py OUT          (OUT: models/tests/fixtures; its sub-folders are replaced)

The committed fixtures were made with diffusers 0.42.1, torch 2.15.0 (CPU, one thread), safetensors 0.8.0; two of the
schedulers want scipy and torchsde too.
The same versions on the same machine give the same bytes; other ones differ in the last bits of the outputs.

unet/NAME/           config.json and weights as `UNet2DModel.save_pretrained` writes them, and io.safetensors:
                       sample        f32 [2,C,H,W]
                       timestep      f64 [2] (values that f32 holds exactly; "learned" takes them as integers)
                       class_labels  i64 [2], or f32 [2,E] for class_embed_type "identity"; where there are classes
                       output        f32, of the network in eval mode; f32 arithmetic, but timesteps are given
                                     as f64, so that the fourier embedding and its last division are f64
                     F16 weights were rounded before the output was computed: they are exact, read them as f32.
schedulers/NAME/     scheduler_config.json as diffusers writes it, and expected.json (see `schedulers` below)
dit/NAME/            the same of `DiTTransformer2DModel` and of the older `Transformer2DModel`: config.json, weights and
                       io.safetensors with sample, timestep f64 [2], class_labels i64 [2] and output, all of its channels
scheduler_classes.json  the noise levels of every class that is taken (see `scheduler_classes` below)
ddpm-tiny/, edm-tiny/, dit-tiny/  what `DDPMPipeline.save_pretrained` and `DiTPipeline.save_pretrained` write, and
                     io.safetensors (see `folders` below)

The script ends by loading every folder again and comparing, and by checking that the networks differ in every field.
"""

import inspect
import json
import math
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    Transformer2DModel,
    UNet2DModel,
)
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)
logging.set_verbosity_error()
logging.disable_progress_bar()

DOWN, ATTN_DOWN, UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
KARRAS_SIGMAS = (0.0625, 37.5)  # f32 holds these exactly


def c_noise(*sigmas):
    """EDM's network time 0.25 ln(sigma), rounded to f32."""
    return tuple(float(np.float32(0.25 * math.log(s))) for s in sigmas)


# --------------------------------------------------------------------------------------------------------------
# Networks. `config` holds what is passed to UNet2DModel; the rest says how the fixture is stored and called.
# Every norm has at least two channels in a group: with one, the group norm cancels what is added before it (biases,
# the time embedding), and a parity test would not see it.
# --------------------------------------------------------------------------------------------------------------

NETWORKS = {
    # A plain DDPM network: positional time, conv sampling, silu. F32. A fractional and a large time.
    "plain": dict(
        f16=False,
        timestep=(440.25, 999.0),
        config=dict(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP),
            attention_head_dim=8, norm_num_groups=4,
        ),
    ),
    # As the first DDPM checkpoints: two layers, padding 0, frequencies shifted, sin before cos, one head
    # (attention_head_dim null), eps 1e-6, dropout. Attention at the outer level only.
    "ddpm-style": dict(
        f16=True,
        timestep=(0.0, 73.0),
        config=dict(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=2,
            down_block_types=(ATTN_DOWN, DOWN), up_block_types=(UP, ATTN_UP),
            attention_head_dim=None, norm_num_groups=2, norm_eps=1e-6, act_fn="swish",
            downsample_padding=0, freq_shift=1, flip_sin_to_cos=False, dropout=0.1,
        ),
    ),
    # As an EDM/ADM network: scale_shift, resnet sampling, class table, several heads, scaled mid block. With
    # scale_shift and attn_norm_num_groups null the mid attention has no norm at all. Plain blocks outside:
    # these sample by convolution whatever downsample_type says.
    "edm-style": dict(
        f16=True,
        timestep=c_noise(0.002, 80.0),
        labels=(4, 1),
        config=dict(
            sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=1,
            down_block_types=(DOWN, ATTN_DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, ATTN_UP, UP),
            attention_head_dim=4, norm_num_groups=4,
            downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
            mid_block_scale_factor=math.sqrt(2.0), num_class_embeds=5,
        ),
    ),
    # scale_shift with its own number of groups in the mid attention; resnet down but conv up; classes embedded
    # as times; mish; more outputs than inputs (learned variance); an inner width (12) below the channels (16).
    "learned-variance": dict(
        f16=True,
        timestep=(12.5, 871.0),
        labels=(3, 250),
        config=dict(
            sample_size=8, out_channels=6, block_out_channels=(16, 16), layers_per_block=1,
            down_block_types=(ATTN_DOWN, DOWN), up_block_types=(ATTN_UP, UP),
            attention_head_dim=12, norm_num_groups=8, attn_norm_num_groups=2, act_fn="mish",
            downsample_type="resnet", resnet_time_scale_shift="scale_shift", class_embed_type="timestep",
            time_embedding_dim=24,
        ),
    ),
    # Fourier time (the timestep is sigma, and the output is divided by it), identity class embedding,
    # centred input, conv down but resnet up, padding 0, a large eps (which shows wherever it is used). F32.
    "fourier": dict(
        f16=False,
        timestep=KARRAS_SIGMAS,
        labels="identity",
        config=dict(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=(ATTN_DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, ATTN_UP),
            attention_head_dim=None, norm_num_groups=4, norm_eps=0.05, center_input_sample=True,
            time_embedding_type="fourier", time_embedding_dim=20, class_embed_type="identity",
            upsample_type="resnet", downsample_padding=0, mid_block_scale_factor=0.5,
        ),
    ),
    # A learned table of times, grey pictures, relu, no attention in the mid block.
    "learned-time-grey": dict(
        f16=True,
        timestep=(0.0, 19.0),
        config=dict(
            sample_size=12, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=(DOWN, DOWN), up_block_types=(UP, UP),
            attention_head_dim=8, norm_num_groups=4, act_fn="relu", add_attention=False,
            time_embedding_type="learned", num_train_timesteps=20,
        ),
    ),
    # One level, so that an odd size is possible; grey; gelu; negative times; two layers.
    "odd-size": dict(
        f16=True,
        timestep=c_noise(0.01, 5.0),
        config=dict(
            sample_size=15, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=2,
            down_block_types=(ATTN_DOWN,), up_block_types=(ATTN_UP,),
            attention_head_dim=8, norm_num_groups=2, attn_norm_num_groups=8, act_fn="gelu",
            center_input_sample=True, time_embedding_dim=24,
        ),
    ),
    # Not square, no mid block, an odd first width (the positional embedding is padded by a zero).
    "not-square": dict(
        f16=True,
        timestep=(1.0, 250.5),
        config=dict(
            sample_size=(18, 12), block_out_channels=(9, 18), layers_per_block=1,
            down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP), mid_block_type=None,
            attention_head_dim=6, norm_num_groups=3, act_fn="gelu", flip_sin_to_cos=False, freq_shift=1,
        ),
    ),
    # Sharded weights; fourier time and a class table; widths that shrink; scale_shift.
    "sharded": dict(
        f16=True,
        shard="40KB",
        timestep=(0.5, 2.5),
        labels=(1, 3),
        config=dict(
            sample_size=(8, 16), block_out_channels=(16, 8), layers_per_block=1,
            down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP),
            attention_head_dim=4, norm_num_groups=4, act_fn="mish", time_embedding_type="fourier",
            num_class_embeds=5, resnet_time_scale_shift="scale_shift", add_attention=False,
        ),
    ),
    # A level of three times the channels, a class table on the default scale shift, the mid attention's own
    # groups, two heads, mid block scaled by 2, 4x4 pictures (the mid block sees 2x2).
    "widening": dict(
        f16=True,
        timestep=c_noise(0.5, 14.6),
        labels=(0, 2),
        config=dict(
            sample_size=4, block_out_channels=(8, 24), layers_per_block=1,
            down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP),
            attention_head_dim=12, norm_num_groups=4, attn_norm_num_groups=6, act_fn="silu",
            num_class_embeds=3, time_embedding_dim=16, mid_block_scale_factor=2.0, flip_sin_to_cos=False,
            downsample_padding=0,
        ),
    ),
}


def make_network(seed, config, f16=False, kind=UNet2DModel):
    """A seeded network in which no norm, bias or scale keeps its trivial initial value."""
    torch.manual_seed(seed)
    net = kind(**config).eval()
    for name, p in net.named_parameters():
        if name == "time_proj.weight":  # fourier frequencies or the table of times: random already
            pass
        elif p.dim() == 1:  # norm weights (one) and all biases
            p.add_(torch.randn_like(p) * 0.2)
        else:
            p.add_(torch.randn_like(p) * 0.3 / math.sqrt(p[0].numel()))
        if f16:
            p.copy_(p.half().float())
    return net


def call(net, sample, timestep, labels=None):
    """The network on f64 timesteps; `learned` indexes a table, so it gets integers."""
    if net.config.time_embedding_type == "learned":
        timestep = timestep.long()
    return net(sample, timestep, labels).sample.float().contiguous()


def networks(out):
    for seed, (name, spec) in enumerate(NETWORKS.items(), start=100):
        net = make_network(seed, spec["config"], spec["f16"])
        size = net.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        io = {
            "sample": torch.randn(2, net.config.in_channels, height, width),
            "timestep": torch.tensor(spec["timestep"], dtype=torch.float64),
        }
        labels = spec.get("labels")
        if labels == "identity":
            io["class_labels"] = torch.randn(2, net.config.time_embedding_dim)
        elif labels is not None:
            io["class_labels"] = torch.tensor(labels)
        io["output"] = call(net, io["sample"], io["timestep"], io.get("class_labels"))
        folder = out / name
        save = {"max_shard_size": spec["shard"]} if "shard" in spec else {}
        (net.half() if spec["f16"] else net).save_pretrained(folder, **save)
        save_file(io, folder / "io.safetensors")


# --------------------------------------------------------------------------------------------------------------
# Class-conditional transformers (DiT)
# --------------------------------------------------------------------------------------------------------------

TRANSFORMERS = {
    # As DiT-XL/2: learned variance, patches of 2, gelu by tanh. The second label is "no class".
    "plain": dict(
        kind=DiTTransformer2DModel, timestep=(440.0, 999.0), labels=(3, 5),
        config=dict(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=5,
        ),
    ),
    # No variance; queries, keys and values without bias; a second norm with weights and another eps; GEGLU.
    "gated": dict(
        kind=DiTTransformer2DModel, timestep=(0.0, 12.5), labels=(0, 2),
        config=dict(
            num_attention_heads=3, attention_head_dim=4, in_channels=3, num_layers=1, sample_size=12, patch_size=3,
            num_embeds_ada_norm=3, attention_bias=False, activation_fn="geglu", norm_elementwise_affine=True,
            norm_eps=0.01,
        ),
    ),
    # The older class, whose positions of a large sample are closer together; gelu by the error function.
    "older-class": dict(
        kind=Transformer2DModel, timestep=(73.0, 250.0), labels=(1, 2),
        config=dict(
            num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=2, sample_size=128,
            patch_size=16, num_embeds_ada_norm=2, norm_type="ada_norm_zero", activation_fn="gelu", attention_bias=True,
            norm_elementwise_affine=False,
        ),
    ),
}


def transformers(out):
    for seed, (name, spec) in enumerate(TRANSFORMERS.items(), start=300):
        net = make_network(seed, spec["config"], True, spec["kind"])
        config = net.config
        io = {
            "sample": torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
            "timestep": torch.tensor(spec["timestep"], dtype=torch.float64),
            "class_labels": torch.tensor(spec["labels"]),
        }
        output = net(io["sample"], timestep=io["timestep"], class_labels=io["class_labels"]).sample
        io["output"] = output.float().contiguous()
        net.half().save_pretrained(out / name)
        save_file(io, out / name / "io.safetensors")


# --------------------------------------------------------------------------------------------------------------
# Schedulers
# --------------------------------------------------------------------------------------------------------------

TIMES = (0, 1, 20, 399, 440, 500, 980, 998, 999)
X_T = [-0.5656854249, 0.31, 1.75, -2.2, 0.0, 0.9]  # a noisy sample, variance preserving
MODEL_OUTPUT = [-0.88, 0.4, -1.1, 0.05, 2.0, -0.3]
TRAINED_BETAS = [round(0.001 + 0.0004 * i + 0.0002 * (i % 3), 6) for i in range(50)]
LINEAR = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
STABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
COSINE = dict(beta_schedule="squaredcos_cap_v2")

SCHEDULERS = {
    "ddpm-linear-epsilon": DDPMScheduler(**LINEAR, clip_sample=False),
    "ddpm-scaled-linear-v": DDPMScheduler(**STABLE, clip_sample=False, prediction_type="v_prediction"),
    "ddpm-cosine-sample": DDPMScheduler(**COSINE, clip_sample=False, prediction_type="sample"),
    "ddpm-cosine-epsilon": DDPMScheduler(**COSINE, clip_sample=False),
    "ddpm-zero-snr-v": DDPMScheduler(
        **LINEAR, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "ddpm-trained-betas": DDPMScheduler(trained_betas=TRAINED_BETAS, num_train_timesteps=50, clip_sample=False),
    "ddim-linear-sample": DDIMScheduler(**LINEAR, clip_sample=False, prediction_type="sample"),
    "ddim-scaled-linear-epsilon": DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim-cosine-v": DDIMScheduler(**COSINE, clip_sample=False, prediction_type="v_prediction"),
    "ddim-zero-snr-v": DDIMScheduler(
        **STABLE, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "pndm-scaled-linear-epsilon": PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1),
    "pndm-linear-v": PNDMScheduler(**LINEAR, prediction_type="v_prediction", set_alpha_to_one=True),
    "euler-linear-epsilon": EulerDiscreteScheduler(**LINEAR),
    "euler-scaled-linear-v": EulerDiscreteScheduler(**STABLE, prediction_type="v_prediction", steps_offset=1),
    "euler-cosine-sample": EulerDiscreteScheduler(**COSINE, prediction_type="sample"),
    "euler-zero-snr-v": EulerDiscreteScheduler(
        **STABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
}


def short(values):
    """f32 numbers as the shortest decimals that give the same f32."""
    return [float(str(np.float32(v))) for v in values]


def alphas_in_f64(scheduler):
    """cumprod(1 - beta) from the config's formula, all in f64 (diffusers computes in f32)."""
    config = scheduler.config
    steps = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas, dtype=np.float64)
    elif config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, steps)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
    else:
        level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    alphas = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(alphas)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = root**2
        if isinstance(scheduler, EulerDiscreteScheduler):
            alphas[-1] = 2.0**-24
    return alphas


def predict_x0(scheduler, t, alpha):
    """x0 as the scheduler's own step says it, with what it was given. Tensors are f32 [1,1,1,6]."""
    x_t = torch.tensor(X_T).reshape(1, 1, 1, -1)
    m = torch.tensor(MODEL_OUTPUT).reshape(1, 1, 1, -1)
    numbers = {"t": t}
    if isinstance(scheduler, EulerDiscreteScheduler):
        # Variance exploding: the sample is x_t / sqrt(alpha), the network sees it scaled back.
        scheduler.set_timesteps(timesteps=[t])
        sample = x_t / alpha**0.5
        time = scheduler.timesteps[0]
        numbers["sample"] = short(sample.flatten())
        numbers["network_input"] = short(scheduler.scale_model_input(sample, time).flatten())
        numbers["network_time"] = float(time)
        numbers["sigma"] = float(scheduler.sigmas[0])
        x0 = scheduler.step(m, time, sample).pred_original_sample
    elif isinstance(scheduler, PNDMScheduler):
        # PNDM gives no x0; its transfer formula to alpha = 1 is x0. In f64, because it cancels.
        scheduler = PNDMScheduler.from_config(scheduler.config)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
        x0 = scheduler._get_prev_sample(x_t.double(), t, -1, m.double())
    else:
        if isinstance(scheduler, DDIMScheduler):
            scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        x0 = scheduler.step(m, t, x_t, generator=torch.Generator().manual_seed(0)).pred_original_sample
    numbers["x0"] = short(x0.flatten())
    return numbers


def level(t, alpha):
    """One noise level; sigma is null where alpha is 0 (zero terminal SNR)."""
    return {"t": t, "alpha": alpha, "sigma": math.sqrt((1 - alpha) / alpha) if alpha > 0 else None}


def edm_numbers(scheduler):
    config = scheduler.config
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    precondition = []
    for sigma in (0.002, 0.01, 0.1, 0.5, 1.0, 2.5, 14.6, 80.0):
        s = torch.tensor([sigma], dtype=torch.float64)
        sample = torch.tensor(X_T, dtype=torch.float64)
        m = torch.tensor(MODEL_OUTPUT, dtype=torch.float64)
        precondition.append({
            "sigma": sigma,
            "c_in": scheduler.precondition_inputs(one, s).item(),
            "c_skip": scheduler.precondition_outputs(one, zero, s).item(),
            "c_out": scheduler.precondition_outputs(zero, one, s).item(),
            "c_noise": scheduler.precondition_noise(s).item(),
            "x0": scheduler.precondition_outputs(sample, m, s).tolist(),
        })
    sigmas, times = {}, {}
    for steps in (1000, 18, 1):
        scheduler.set_timesteps(steps)
        sigmas[str(steps)], times[str(steps)] = short(scheduler.sigmas), short(scheduler.timesteps)
    # Euler with a network that answers 0: D = sd^2 x / (sigma^2 + sd^2), the denoiser of N(0, sd^2).
    scheduler.set_timesteps(18)
    start = torch.tensor(X_T) * config.sigma_max
    x = start.reshape(1, 1, 1, -1)
    for time in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(scheduler.scale_model_input(x, time)), time, x).prev_sample
    ramp, power = np.linspace(0, 1, 18), 1 / config.rho
    exact = (config.sigma_max**power + ramp * (config.sigma_min**power - config.sigma_max**power)) ** config.rho
    y, sd2 = np.array(X_T) * config.sigma_max, config.sigma_data**2
    for now, after in zip(exact, [*exact[1:], 0.0]):
        y = y + (y - sd2 * y / (now**2 + sd2)) / now * (after - now)
    return {
        "inputs": {"sample": X_T, "model_output": MODEL_OUTPUT},
        "precondition": precondition,
        "sigmas": sigmas,
        "timesteps": times,
        "euler_18_zero_network": {"start": short(start), "end": short(x.flatten()), "end_f64": y.tolist()},
    }


def schedulers(out):
    """expected.json. DDPM, DDIM, PNDM, Euler:
      inputs.x_t, inputs.model_output   the tensors of every prediction below
      levels       alpha (= alphas_cumprod, diffusers' f32 value) and sigma = sqrt((1 - alpha) / alpha) at each t
      levels_f64   the same with alpha by the same formulas in f64. The two differ by up to 4e-5 relative in alpha,
                   and near t = 0, where 1 - alpha is small, by up to 3e-4 in sigma.
      predictions  x0 that the scheduler itself predicts (f32). Euler also: sample (= x_t / sqrt(alpha)), the
                   network_input made from it, network_time, sigma.  Left out where alpha is 0 and x0 undefined.
    EDM: precondition (f64), sigmas and timesteps of 1000, 18 and 1 steps (f32), and an 18-step Euler run with a
    network that answers zero, by diffusers (f32) and in f64.
    """
    for name, scheduler in SCHEDULERS.items():
        alphas, exact = scheduler.alphas_cumprod, alphas_in_f64(scheduler)
        times = [t for t in TIMES if t < len(alphas)]
        if len(alphas) < 1000:
            times += [33, len(alphas) - 1]
        defined = [t for t in times if alphas[t] > 0 or scheduler.config.prediction_type != "epsilon"]
        write(out / name, scheduler, {
            "inputs": {"x_t": X_T, "model_output": MODEL_OUTPUT},
            "levels": [level(t, float(alphas[t])) for t in times],
            "levels_f64": [level(t, float(exact[t])) for t in times],
            "predictions": [predict_x0(scheduler, t, float(alphas[t])) for t in defined],
        })
    for kind in ("epsilon", "v_prediction"):
        scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type=kind)
        write(out / f"edm-{kind.split('_')[0]}", scheduler, edm_numbers(scheduler))


CONFIGS = {
    "default": {},
    "100 steps": {"num_train_timesteps": 100},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01},
    "linear": {"beta_schedule": "linear", "beta_start": 0.001},
    "trained": {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    "edm": {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0},
    "exponential": {"sigma_schedule": "exponential"},
}


def scheduler_classes(out):
    """For every class in src/folder/schedulers.json, which must have its keys and defaults: the first, last and middle
    sigma of the configs above that it has all keys of, and whether it clips by default."""
    table = json.loads((Path(__file__).parent / "../src/folder/schedulers.json").read_text())
    classes = {}
    for name, defaults in table.items():
        kind = getattr(diffusers, name)
        parameters = inspect.signature(kind.__init__).parameters
        assert defaults == {k: v.default for k, v in parameters.items() if k not in ("self", "kwargs")}, name
        sigmas = {}
        for label, config in CONFIGS.items():
            euler = name == "EulerDiscreteScheduler" or name == "UniPCMultistepScheduler"  # sigma_min of their sampler
            if all(key in defaults for key in config) and not (euler and "sigma_min" in config) and not (name == "UnCLIPScheduler" and label == "cosine"):
                sigmas[label] = ends(kind, config)
        classes[name] = {"clip": bool(kind().config.get("clip_sample", False)), "sigmas": sigmas}
    rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in classes.items())
    out.write_text('{\n  "configs": ' + json.dumps(CONFIGS) + ',\n  "classes": {\n' + rows + "\n  }\n}\n")


def ends(kind, config):
    if "trained_betas" in config:  # one class wants an array
        config = {**config, "trained_betas": np.array(config["trained_betas"], dtype=np.float32)}
    scheduler = kind(**config)
    if not hasattr(scheduler, "alphas_cumprod"):
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    if hasattr(scheduler, "alphas_cumprod"):
        alphas = scheduler.alphas_cumprod.double()
        table = ((1 - alphas) / alphas) ** 0.5
    else:
        table = scheduler.sigmas[:-1].double().sort().values
    return [float(f"{float(table[i]):.6g}") for i in (0, -1, len(table) // 2)]


def write(folder, scheduler, numbers):
    scheduler.save_pretrained(folder)
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in numbers.items()]
    (folder / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


# --------------------------------------------------------------------------------------------------------------
# Whole folders
# --------------------------------------------------------------------------------------------------------------

TINY = dict(
    sample_size=8, block_out_channels=(8, 8), layers_per_block=1,
    down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP), attention_head_dim=8, norm_num_groups=4,
    time_embedding_dim=24,
)


def folders(out):
    """F16 weights (exact), f32 arithmetic. io.safetensors:
    ddpm-tiny (epsilon, linear, T = 1000, diffusers' default clip_sample true):
      noise = x_t f32 [2,3,8,8] (unit normal, variance preserving), timestep i64 [1] = 440,
      model_output, pred_x0 (NOT clipped), pred_x0_clipped (what the stored scheduler answers)
    edm-tiny (EDMEulerScheduler, 3 classes):
      noise, class_labels i64 [2], timestep f32 [1] (0.25 ln 80), model_input, model_output, pred_x0 = D(80 noise, 80),
      prev_sample of one Euler step from 80 to 0: D again, but for the f32 rounding of 80 noise
    dit-tiny (DiTPipeline: 5 classes with names, learned sigma, 4-channel latents, an AutoencoderKL, DDIMScheduler):
      noise f32 [3,4,8,8], class_labels i64 [3], latents: after four Euler steps on the Karras sigmas, guided: the same with
      classifier-free guidance of scale 3, and pictures f32 [3,3,16,16]: the latents decoded
    """
    net = make_network(200, TINY, f16=True)
    DDPMPipeline(unet=net.half(), scheduler=DDPMScheduler(**LINEAR)).save_pretrained(out / "ddpm-tiny")
    noise = torch.randn(2, 3, 8, 8)
    save_file(ddpm_io(out / "ddpm-tiny", noise), out / "ddpm-tiny" / "io.safetensors")

    net = make_network(201, dict(TINY, num_class_embeds=3), f16=True)
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    DDPMPipeline(unet=net.half(), scheduler=scheduler).save_pretrained(out / "edm-tiny")
    noise = torch.randn(2, 3, 8, 8)
    save_file(edm_io(out / "edm-tiny", noise, torch.tensor([2, 0])), out / "edm-tiny" / "io.safetensors")

    net = make_network(202, TRANSFORMERS["plain"]["config"], True, DiTTransformer2DModel)
    vae = make_network(203, DECODER, True, AutoencoderKL)
    # As convert_dit_to_diffusers.py of diffusers has it.
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    DiTPipeline(net.half(), vae.half(), scheduler).save_pretrained(out / "dit-tiny")
    # `save_pretrained` leaves the names out; the published folders have them, written by hand.
    names = {0: "tench, Tinca tinca", 1: "goldfish", 2: "kite", 3: "bald eagle, American eagle", 4: "vulture"}
    index = out / "dit-tiny" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}, indent=2) + "\n")
    noise = torch.randn(3, 4, 8, 8)
    save_file(dit_io(out / "dit-tiny", noise, torch.tensor([0, 4, 2])), out / "dit-tiny" / "io.safetensors")


# A decoder of latents with 4 channels and half the pictures' sides.
DECODER = dict(
    block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4, norm_num_groups=2, sample_size=16,
)


def dit_io(folder, noise, labels):
    pipe = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.get_label_ids(["Tinca tinca", "vulture"]) == [0, 4]
    net, none = pipe.transformer.eval(), torch.full_like(labels, 5)
    # The steps of `dmd sample --sampler euler`.
    scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True, timestep_spacing="linspace"
    )

    def sample(scale):
        scheduler.set_timesteps(4)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x_in, times = scheduler.scale_model_input(x, t), t.expand(len(x))
            eps = lambda labels: net(x_in, timestep=times, class_labels=labels).sample[:, :4]
            cond, uncond = eps(labels), eps(none)
            x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
        return x

    latents = sample(1.0)
    pictures = pipe.vae.eval().decode(latents / pipe.vae.config.scaling_factor).sample.contiguous()
    return {"noise": noise, "class_labels": labels, "latents": latents, "guided": sample(3.0), "pictures": pictures}


def ddpm_io(folder, noise):
    pipe = DDPMPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.unet.eval()
    free = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    t = 440
    m = pipe.unet(noise, t).sample
    step = lambda s: s.step(m, t, noise, generator=torch.Generator().manual_seed(0)).pred_original_sample
    return {
        "noise": noise, "x_t": noise.clone(), "timestep": torch.tensor([t]), "model_output": m,
        "pred_x0": step(free), "pred_x0_clipped": step(pipe.scheduler),
    }


def edm_io(folder, noise, labels):
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32).eval()
    scheduler = EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(1)
    time = scheduler.timesteps[0]
    x = noise * scheduler.config.sigma_max
    model_input = scheduler.scale_model_input(x, time)
    m = unet(model_input, time, labels).sample
    step = scheduler.step(m, time, x)
    return {
        "noise": noise, "class_labels": labels, "timestep": time.reshape(1), "model_input": model_input,
        "model_output": m, "pred_x0": step.pred_original_sample, "prev_sample": step.prev_sample,
    }


# --------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------


def check(out):
    """Every folder, loaded again by diffusers, gives what io.safetensors says; every field takes two values."""
    seen = {}
    for folder in sorted((out / "unet").iterdir()):
        net = UNet2DModel.from_pretrained(folder, dtype=torch.float32).eval()
        io = load_file(folder / "io.safetensors")
        args = io["sample"], io["timestep"], io.get("class_labels")
        again = call(net, *args)
        peak = io["output"].abs().max()
        error = ((again - io["output"]).abs().max() / peak).item()
        labels = args[2].double() if args[2] is not None and args[2].is_floating_point() else args[2]
        net.double()  # how exact is f32 arithmetic here?
        if net.config.class_embed_type == "timestep":  # diffusers does not cast these embeddings
            net.class_embedding.linear_1.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
        wide = call(net, args[0].double(), args[1], labels)
        rounding = ((wide - io["output"]).abs().max() / peak).item()
        assert error == 0 and rounding < 2e-5 and 0.05 < peak < 100, (folder.name, error, rounding, peak)
        count = sum(p.numel() for p in net.parameters())
        print(f"{folder.name:18} {count:6} parameters, |output| <= {peak:.3f}, f32 against f64 {rounding:.1e}")
        for key, value in net.config.items():
            if not key.startswith("_"):
                seen.setdefault(key, set()).add(json.dumps(value))
    for key, values in sorted(seen.items()):
        print(f"  {key}: {', '.join(sorted(values))}")
    assert all(len(values) > 1 for values in seen.values()), "a field has one value only"
    for name, run in (("ddpm-tiny", ddpm_io), ("edm-tiny", edm_io), ("dit-tiny", dit_io)):
        io = load_file(out / name / "io.safetensors")
        again = run(out / name, io["noise"], *([io["class_labels"]] if "class_labels" in io else []))
        assert all(torch.equal(io[key], again[key]) for key in io), name
        print(name, {key: round(value.float().abs().max().item(), 3) for key, value in io.items()})
    for folder in sorted((out / "schedulers").iterdir()):
        wanted = json.loads((folder / "scheduler_config.json").read_text())
        kind = getattr(diffusers, wanted["_class_name"])
        scheduler = kind.from_pretrained(folder)
        assert dict(scheduler.config) == {**wanted, **scheduler.config}, folder.name
        expected = json.loads((folder / "expected.json").read_text())
        for row in expected.get("levels", []):
            assert row["alpha"] == float(scheduler.alphas_cumprod[row["t"]]), folder.name
        drift = [
            abs(a["alpha"] / b["alpha"] - 1)
            for a, b in zip(expected.get("levels", []), expected.get("levels_f64", [])) if b["alpha"] > 0
        ]
        print(f"{folder.name:28} alphas_cumprod f32 against f64: {max(drift, default=0):.1e}")
    total = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{total} bytes in all")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    for part in ("unet", "dit", "schedulers", "ddpm-tiny", "edm-tiny", "dit-tiny"):
        shutil.rmtree(out / part, ignore_errors=True)
    networks(out / "unet")
    transformers(out / "dit")
    schedulers(out / "schedulers")
    scheduler_classes(out / "scheduler_classes.json")
    folders(out)
    check(out)


if __name__ == "__main__":
    main()
