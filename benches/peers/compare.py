#!/usr/bin/env python3
"""`dmd bench train` and its PyTorch peer in turn, as ratios. Run by `cargo xtask bench`.

Every round runs each program once, one after the other, so that a machine whose speed drifts is the same for all; a
figure is the median of the rounds. Ratios are PyTorch's time over ours: above 1, ours is faster. The peer that counts is
the faster of eager and torch.compile. The floor is what the arithmetic alone takes, as `dmd bench train` measures it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def run(command):
    """The rows of one program by name; its own words go where ours do."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed: {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = lines[0]["results"] if "results" in lines[0] else lines
    return {row["what"]: row for row in rows}


def figure(row):
    return row.get("ms", row.get("mib"))


def main():
    parser = argparse.ArgumentParser(prog="cargo xtask bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--dmd", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--against-torch", action="store_true", help="the default, and the only comparison there is")
    parser.add_argument("--unet", action="append", help="a UNet2DModel's config.json [default: unet-16 and unet-32]")
    parser.add_argument("--batch", type=int, default=16, help="samples per update [default: 16]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each program [default: all cores]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both run [default: cpu]")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32", help="on a GPU; f32 multiplies in TF32 on both sides")
    parser.add_argument("--steps", type=int, default=5, help="repetitions within a program's run [default: 5]")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each program [default: 5]")
    args = parser.parse_args()
    networks = args.unet or [os.path.join(HERE, name) for name in ("unet-16.json", "unet-32.json")]
    print("| network | work | floor | dmd | PyTorch eager | compiled | ratio |\n|---|---|---|---|---|---|---|", flush=True)
    for network in networks:
        options = ["--unet", network, "--batch", str(args.batch), "--threads", str(args.threads), "--steps", str(args.steps)]
        peer = [sys.executable, "-W", "ignore", os.path.join(HERE, "train.py"), *options, "--device", args.device]
        if args.device == "cuda":
            peer += ["--dtype", args.precision, "--channels-last"]
        programs = {
            "dmd": [args.dmd, "--json", "bench", "train", "--device", args.device, "--precision", args.precision, *options],
            "eager": peer,
            "compiled": [*peer, "--compile"],
        }
        found = {name: [] for name in programs}
        for number in range(args.rounds):
            for name, command in programs.items():
                print(f"{os.path.basename(network)}: round {number + 1}/{args.rounds}, {name}", file=sys.stderr)
                found[name].append(run(command))
        for what in found["dmd"][0]:
            of = {name: [figure(rows[what]) for rows in rounds] for name, rounds in found.items()}
            # In every round its own ratio, so that drift between rounds cancels.
            ratios = [min(eager, compiled) / ours for ours, eager, compiled in zip(*of.values())]
            unit, digits = ("MiB", 0) if what == "peak_memory" else ("ms", 1)
            name = os.path.splitext(os.path.basename(network))[0]
            floors = [rows[what]["floor_ms"] for rows in found["dmd"] if "floor_ms" in rows[what]]
            cells = [f"{statistics.median(floors):.1f} ms" if floors else ""]
            cells += [f"{statistics.median(of[program]):.{digits}f} {unit}" for program in programs]
            print(f"| {name} | {what} | {' | '.join(cells)} | {statistics.median(ratios):.2f}× |", flush=True)


main()
