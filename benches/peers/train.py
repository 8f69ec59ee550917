#!/usr/bin/env python3
"""One iteration of Distribution Matching Distillation in PyTorch: the same network and the same work as
`dmd bench train`, timed the same way. `cargo xtask bench` runs both in turn.

Needs torch and diffusers. One JSON object per line on stdout; each figure is the median of --steps repetitions.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from diffusers import UNet2DModel
from torch.nn.functional import mse_loss

SIGMA_DATA = 0.5
GENERATOR_SIGMA = 2.5
WARM_UP = 2


def column(x):
    return x.view(-1, 1, 1, 1)


def denoise(net, x, sigma, label):
    """The clean image that an EDM network sees in x (Karras et al. 2022, table 1)."""
    s = column(sigma)
    total = s**2 + SIGMA_DATA**2
    f = net(x / total.sqrt(), sigma.log() / 4, class_labels=label, return_dict=False)[0]
    return x * SIGMA_DATA**2 / total + f.float() * s * SIGMA_DATA / total.sqrt()


class Iteration:
    def __init__(self, args):
        with open(args.unet) as file:
            config = {k: v for k, v in json.load(file).items() if not k.startswith("_")}
        nets = [UNet2DModel(**config).to(args.device) for _ in range(3)]
        if args.channels_last:
            nets = [net.to(memory_format=torch.channels_last) for net in nets]
        generator, real, fake = nets
        real.requires_grad_(False)
        self.parameters = [list(generator.parameters()), list(fake.parameters())]
        fused = args.device == "cuda"
        self.optimizers = [torch.optim.AdamW(p, lr=1e-4, weight_decay=0.01, fused=fused) for p in self.parameters]
        self.generator, self.real, self.fake = (torch.compile(net) if args.compile else net for net in nets)
        size = config["sample_size"]
        self.shape = (args.batch, config["in_channels"], size, size)
        self.classes = config.get("num_class_embeds")
        self.args = args

    def cast(self):
        return torch.autocast(self.args.device, dtype=torch.bfloat16, enabled=self.args.dtype == "bf16")

    def noise(self):
        return torch.randn(self.shape, device=self.args.device)

    def label(self):
        if self.classes:
            return torch.randint(0, self.classes, (self.args.batch,), device=self.args.device)

    def sigma(self):
        """Uniform over the middle of Karras's schedule of 1000 levels."""
        i = torch.randint(20, 981, (self.args.batch,), device=self.args.device) / 999
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return (low + i * (high - low)) ** 7

    def generate(self, label):
        sigma = torch.full((self.args.batch,), GENERATOR_SIGMA, device=self.args.device)
        return denoise(self.generator, self.noise() * GENERATOR_SIGMA, sigma, label)

    def learn(self, which, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters[which], 10.0)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad(set_to_none=True)

    def one_step_sample(self):
        with torch.no_grad(), self.cast():
            self.generate(self.label())

    def generator_update(self):
        label, sigma = self.label(), self.sigma()
        with self.cast():
            x = self.generate(label)
            with torch.no_grad():
                x_t = x + column(sigma) * self.noise()
                real = denoise(self.real, x_t, sigma, label)
                fake = denoise(self.fake, x_t, sigma, label)
                grad = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
        self.learn(0, 0.5 * mse_loss(x, (x - grad).detach()))

    def critic_update(self):
        label, sigma = self.label(), self.sigma()
        with self.cast():
            with torch.no_grad():
                x = self.generate(label)
            x0 = denoise(self.fake, x + column(sigma) * self.noise(), sigma, label)
        weight = column(sigma**-2 + SIGMA_DATA**-2)
        self.learn(1, (weight * (x0 - x) ** 2).mean())

    def iteration(self):
        self.generator_update()
        for _ in range(self.args.ratio):
            self.critic_update()


def milliseconds(work, args):
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for _ in range(WARM_UP):
        work()
    laps = []
    for _ in range(args.steps):
        wait()
        start = time.perf_counter()
        work()
        wait()
        laps.append(time.perf_counter() - start)
    return statistics.median(laps) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unet", required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    work = Iteration(args)
    for what, run in [
        ("one_step_sample", work.one_step_sample),
        ("generator_update", work.generator_update),
        ("critic_update", work.critic_update),
        (f"iteration_ratio_{args.ratio}", work.iteration),
    ]:
        print(json.dumps({"what": what, "ms": milliseconds(run, args)}), flush=True)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"what": "peak_memory", "mib": peak / 2**20, "version": torch.__version__}), flush=True)


main()
