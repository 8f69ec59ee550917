"""An exported file in ncnn: `run_ncnn.py PNNX PORTS FILE.onnx EXPECTED.npy`, where the picture is of seed 7 and the file has one class folded in.

Prints the greatest difference to it, or what keeps ncnn from it.
"""

import pathlib
import subprocess
import sys

import ncnn
import numpy as np

pnnx, ports, model, expected = sys.argv[1:]
sys.path.insert(0, ports)
import noise

expected = np.load(expected)[0]
shape = "inputshape=[1,{},{},{}]".format(*expected.shape)
param, weights = (str(pathlib.Path(model).with_suffix(end)) for end in (".ncnn.param", ".ncnn.bin"))
made = subprocess.run([pnnx, model, shape, f"ncnnparam={param}", f"ncnnbin={weights}", "fp16=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
if made.returncode:
    sys.exit(f"pnnx ends with {made.returncode}")
layers = [line.split() for line in pathlib.Path(param).read_text().splitlines()[2:]]
# What pnnx has no layer for keeps the name of its own operator.
foreign = sorted({layer[0] for layer in layers if "." in layer[0] or "::" in layer[0]})
if foreign:
    sys.exit(f"ncnn has no {', '.join(foreign)}")
net = ncnn.Net()
net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
net.opt.num_threads = 1
if net.load_param(param) or net.load_model(weights):
    sys.exit("ncnn does not load it")
values = np.array(noise.normals(7, noise.PICTURE_NOISE, 0, expected.size), dtype=np.float32).reshape(expected.shape)
run = net.create_extractor()
sample = ncnn.Mat(values).clone()
run.input("in0", sample)
failed, found = run.extract("out0")
if failed:
    sys.exit("ncnn fails when it runs")
print(f"{len(layers)}\t{np.abs(np.array(found) - expected).max():.1e}")
