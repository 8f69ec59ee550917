"""Pictures of a model folder that dmd wrote, by diffusers alone: a teacher's in many steps, a generator's in its own.

    pip install torch diffusers safetensors
    python pictures.py FOLDER OUT.png [-n 16] [--label 0] [--steps 18] [--seed 0]

--noise FILE.npy (unit normal, f32 [N, C, H, W]) takes the place of the seed, and --npy FILE.npy writes the pictures as
they are, around [-1, 1]: `dmd sample FOLDER --sampler euler --noise … --npy …` gives the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image


def denoise(network, scheduler, x, sigma, labels):
    """The clean picture behind x = x0 + sigma·noise."""
    if type(scheduler).__name__.startswith("EDM"):
        output = network(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma), labels).sample
        return scheduler.precondition_outputs(x, output, sigma)
    # The network knows whole timesteps; a sigma may lie between two.
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    timestep = np.interp(np.log(sigma), np.log(sigmas.double().numpy()), np.arange(len(sigmas)))
    total = 1 + sigma**2
    timesteps = torch.full((len(x),), timestep, dtype=torch.float32)
    # A transformer may answer with a variance too.
    output = network(x / total**0.5, timesteps, labels).sample[:, : x.shape[1]]
    return {
        "epsilon": lambda: x - sigma * output,
        "v_prediction": lambda: x / total - sigma / total**0.5 * output,
        "sample": lambda: output,
    }[scheduler.config.prediction_type]()


def decoded(pipe, x0):
    """The pictures behind latents, where there is a decoder."""
    vae = getattr(pipe, "vae", None)
    return x0 if vae is None else vae.decode(x0 / vae.config.scaling_factor).sample


def pictures(folder, noise, labels, steps):
    """f32 (N, C, H, W) around [-1, 1]."""
    about = json.loads((folder / "dmd.json").read_text()) if (folder / "dmd.json").exists() else {}
    # The pipeline that model_index.json names scales its noise and its network's input, and hands on classes.
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    network = getattr(pipe, "unet", None) or pipe.transformer
    if about.get("kind") != "generator" and network is getattr(pipe, "transformer", None):
        # DiTPipeline takes no noise.
        scheduler = EulerDiscreteScheduler.from_config(
            pipe.scheduler.config, use_karras_sigmas=True, timestep_spacing="linspace"
        )
        scheduler.set_timesteps(steps)
        x, sigmas = noise * scheduler.sigmas[0], scheduler.sigmas.double().tolist()
        for sigma, after in zip(sigmas, sigmas[1:]):
            x0 = denoise(network, pipe.scheduler, x, sigma, labels)
            x = x0 + after / sigma * (x - x0)
        return decoded(pipe, x)
    if about.get("kind") != "generator":
        given = {} if labels is None else {"class_labels": labels}
        images = pipe(batch_size=len(noise), latents=noise, num_inference_steps=steps, output_type="np", **given).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    x0 = torch.zeros_like(noise)
    for sigma in about.get("steps") or [about["sigma"]]:
        x0 = denoise(network, pipe.scheduler, x0 + sigma * noise, sigma, labels)
        noise = torch.randn_like(noise)
    return decoded(pipe, x0)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--label", type=int, help="one class for all; else each in turn")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=Path)
    parser.add_argument("--npy", type=Path)
    args = parser.parse_args()
    part = "unet" if (args.folder / "unet").exists() else "transformer"
    config = json.loads((args.folder / part / "config.json").read_text())
    size = config["sample_size"]
    shape = [config["in_channels"], *(size if isinstance(size, list) else [size, size])]
    generator = torch.manual_seed(args.seed)
    noise = torch.from_numpy(np.load(args.noise)) if args.noise else torch.randn(args.n, *shape, generator=generator)
    rows = config.get("num_class_embeds")
    about = json.loads((args.folder / "dmd.json").read_text()) if (args.folder / "dmd.json").exists() else {}
    n_classes = config.get("num_embeds_ada_norm") or (rows and rows - bool(about.get("null_class")))
    in_turn = torch.arange(len(noise)) % (n_classes or 1)
    labels = (in_turn if args.label is None else torch.full_like(in_turn, args.label)) if n_classes else None
    images = pictures(args.folder, noise, labels, args.steps)
    if args.npy:
        np.save(args.npy, images.float().numpy())
    if args.out:
        row = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
        Image.fromarray(row.squeeze(-1).numpy()).save(args.out)


if __name__ == "__main__":
    main()
