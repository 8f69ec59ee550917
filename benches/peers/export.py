"""One pass of a generator as PyTorch runs and exports it, beside files of ours. `cargo xtask bench-export` calls this.

    export.py make CONFIG.json FOLDER                a diffusers folder of that UNet2DModel with random weights
    export.py compare FOLDER SIGMA NAME=FILE.onnx…   our files of that folder, exported at that noise level

compare runs PyTorch eagerly and compiled, and on ONNX Runtime what torch.onnx.export writes and our files: one thread,
one picture, a pass of each in turn, so that what else the machine does falls on all alike. It fails where a file's
picture is not PyTorch's.
"""

import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import DDPMPipeline, EDMEulerScheduler, UNet2DModel

SIGMA_DATA = 0.5
ROUNDS = 60
WARM_UP = 5
# As a part of the largest value. Only for single precision: what other precisions may lose, dmd export checks.
TOLERANCE = 1e-4


class OneStep(torch.nn.Module):
    """Noise to x0 at one noise level, with EDM's preconditioning."""

    def __init__(self, unet, sigma):
        super().__init__()
        self.unet, self.sigma = unet, sigma

    def forward(self, noise, label=None):
        variance = self.sigma**2 + SIGMA_DATA**2
        x = noise * self.sigma
        c_noise = torch.full((noise.shape[0],), float(np.log(self.sigma) / 4))
        f = self.unet(x / variance**0.5, c_noise, class_labels=label, return_dict=False)[0]
        return x * (SIGMA_DATA**2 / variance) + f * (self.sigma * SIGMA_DATA / variance**0.5)


def make(config, folder):
    torch.manual_seed(0)
    fields = json.loads(Path(config).read_text())
    unet = UNet2DModel(**{key: value for key, value in fields.items() if not key.startswith("_")})
    # Norms begin as plain scales of 1, which a trained network's are not, and an optimiser might see through.
    for name, weight in unet.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(folder, sigma, files):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet2DModel.from_pretrained(Path(folder) / "unet", low_cpu_mem_usage=False).eval()
    model = OneStep(unet, float(sigma)).eval()
    args = (torch.randn(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size),)
    if unet.config.num_class_embeds:
        args += (torch.zeros(1, dtype=torch.long),)
    names = ["noise", "label"][: len(args)]
    feed = {name: value.numpy() for name, value in zip(names, args)}
    expected = model(*args).numpy()
    compiled = torch.compile(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "peer.onnx")
        torch.onnx.export(
            model, args, path, input_names=names, output_names=["image"], dynamo=True, external_data=False, verbose=False
        )
        peer, peer_nodes = session(path), len(onnx.load(path).graph.node)
    works = {
        "PyTorch, eager": (lambda: model(*args), None),
        "PyTorch, compiled": (lambda: compiled(*args), None),
        "torch.onnx.export": (lambda: peer.run(None, feed), peer_nodes),
    }
    peers = len(works)
    for name, file in (pair.split("=", 1) for pair in files):
        ours = session(file)
        difference = np.abs(ours.run(None, feed)[0] - expected).max() / np.abs(expected).max()
        if "fp32" in name and not difference <= TOLERANCE:
            sys.exit(f"{file} differs from PyTorch by {difference:.1e} of the largest value, at most {TOLERANCE} is allowed")
        works[f"dmd, {name}"] = (lambda ours=ours: ours.run(None, feed), len(onnx.load(file).graph.node))
    laps = {name: [] for name in works}
    for turn in range(WARM_UP + ROUNDS):
        for name, (work, _) in works.items():
            started = time.perf_counter()
            work()
            if turn >= WARM_UP:
                laps[name].append(time.perf_counter() - started)
    ms = {name: statistics.median(times) * 1e3 for name, times in laps.items()}
    fastest = min(list(ms.values())[:peers])
    print(f"{Path(folder).name}, PyTorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}")
    print("| program | ms | times as fast as the fastest peer | nodes | part of torch.onnx.export's |\n|---|---|---|---|---|")
    for name, (_, nodes) in works.items():
        counts = f"{nodes} | {nodes / peer_nodes:.2f}" if nodes else "|"
        print(f"| {name} | {ms[name]:.2f} | {fastest / ms[name]:.2f} | {counts} |")


if __name__ == "__main__":
    # What the packages tell of themselves would bury the table.
    logging.disable(logging.WARNING)
    with torch.no_grad():
        match sys.argv[1:]:
            case ["make", config, folder]:
                make(config, folder)
            case ["compare", folder, sigma, *files]:
                compare(folder, sigma, files)
            case _:
                sys.exit(__doc__)
