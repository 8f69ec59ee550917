"""Makes seeds/: one small file of each kind that the targets read, where the project's fixtures have none. Everything in it
is made here, `.ort` files from the runtime's fixtures by the program. Pillow and numpy; python fuzz/seeds.py DMD"""
import io, json, pathlib, struct, subprocess, sys, zipfile
import numpy as np
from PIL import Image

root = pathlib.Path(__file__).resolve().parent
seed = lambda target, name: (root / "seeds" / target).mkdir(parents=True, exist_ok=True) or root / "seeds" / target / name

for name in ("classes-f32", "steps-f32"):
    fixture = root.parent / "runtime/tests/fixtures" / f"{name}.onnx"
    subprocess.run([sys.argv[1], "ort", fixture, "--out", seed("ort", f"{name}.ort"), "--force"], check=True)

seed("metadata", "steps").write_text('format=2\nsigma=8\nsteps=[8.0, 2.0]\nclasses=["a", "b"]\ndynamic_batch=true\nprecision=fp16\n')
seed("metadata", "u8").write_text("output=u8\nbatch=2\nheight=4\nfixed_class=a\n")

header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "h": {"dtype": "F16", "shape": [1], "data_offsets": [16, 18]}, "__metadata__": {"dmd": "{}"}}).encode()
seed("safetensors", "two").write_bytes(struct.pack("<Q", len(header)) + header + bytes(18))

seed("dmd_json", "generator").write_text(json.dumps({"kind": "generator", "sigma": 2.5, "steps": [2.5, 0.5], "classes": ["a"], "null_class": True, "data": "here", "version": "0.1.0", "run": {"steps": 1}}))

for name, array in {"f32": np.zeros((1, 3, 2, 2), "<f4"), "f64": np.zeros((2, 1, 1, 1)), "u8": np.zeros((1, 2, 2, 3), "u1")}.items():
    np.save(seed("npy", f"{name}.npy"), array)

picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
formats = ["png", "jpeg", "webp", "gif", "bmp"]
for i, format in enumerate(formats):
    file = io.BytesIO()
    picture.save(file, format)
    seed("picture", format).write_bytes(bytes([i]) + file.getvalue())
with zipfile.ZipFile(seed("zip", "classes.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        file = io.BytesIO()
        picture.save(file, "png")
        archive.writestr(name, file.getvalue())
