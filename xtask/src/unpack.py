# Takes ONNX Runtime's library out of its wheel: unpack.py WHEEL FOLDER. Prints the file's name and its sha256.
# Python does this because it is there already (pip fetched the wheel), and Rust would need a zip and a sha2 crate.
import hashlib, os, re, sys, zipfile

wheel, folder = sys.argv[1:]
library = re.compile(r"onnxruntime/capi/(libonnxruntime\.so\.[0-9.]+|libonnxruntime\.[0-9.]+\.dylib|onnxruntime\.dll)$")
with zipfile.ZipFile(wheel) as archive:
    found = [match for match in map(library.match, archive.namelist()) if match]
    if len(found) != 1:
        sys.exit("%s holds %d files that look like the library, expected 1" % (os.path.basename(wheel), len(found)))
    content = archive.read(found[0].group(0))
with open(os.path.join(folder, found[0].group(1)), "wb") as file:
    file.write(content)
print(found[0].group(1))
print(hashlib.sha256(content).hexdigest())
