"""Pictures from generators that `dmd export --onnx` wrote, by the C ABI of dmd-runtime (dmd.h): a seed in, numpy out.

A `Generator` may be used by any number of threads at once: Python's lock is not held while pictures are made.
"""

import ctypes
import json
import os
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint8, c_uint32, c_uint64
from ctypes import c_void_p, sizeof
from ctypes.util import find_library
from pathlib import Path

import numpy

__all__ = ["DmdError", "Generator", "Watch", "engines", "noise", "png"]

ABI_VERSION = 1
STATUSES = (
    "ok bad_argument bad_handle buffer_too_small bad_file no_engine bad_request run_failed no_memory cancelled panic other"
).split()
ENGINES = {"auto": 0, "onnxruntime": 1, "tract": 2}
PICTURE_NOISE = 0
REFINING_NOISE = 0x100


class DmdError(Exception):
    """What went wrong, in a sentence; `status` is its kind: `bad_file`, `no_engine`, `bad_request`, `cancelled`, …"""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = STATUSES[status] if status < len(STATUSES) else "other"


class _Options(Structure):
    _fields_ = [("size", c_size_t), ("threads", c_size_t), ("library", c_char_p), ("engine", c_uint32)]
    _fields_ += [("require_accelerator", c_uint32), ("accelerators", c_char_p), ("low_memory", c_uint32)]


class _Request(Structure):
    _fields_ = [("size", c_size_t), ("seed", c_uint64), ("batch", c_size_t), ("labels", POINTER(c_int64))]
    _fields_ += [("n_labels", c_size_t), ("watch", c_uint64)]


class _Info(Structure):
    _fields_ = [(name, c_size_t) for name in "size channels height width batch n_classes n_passes".split()]


_OnProgress = ctypes.CFUNCTYPE(None, c_void_p, c_size_t, c_size_t)


class Generator:
    """An exported file, ready to make pictures; from a path, or from its bytes.

    `engine` is "auto", "onnxruntime" or "tract"; `threads` 0 for all; `library` ONNX Runtime's library or its folder;
    `accelerators` what may run it in the place of the processor, as docs/runtime.md spells them, and `require` whether one of
    them must run every node; `low_memory` whether ONNX Runtime is to hold less, for a quarter more time. `placement` says what runs it, how that was proven, and why nothing before it in the list does.
    Usable in a `with` statement; otherwise closed when it is collected.
    """

    def __init__(self, model, *, engine="auto", threads=0, library=None, accelerators=(), require=False, low_memory=False):
        self._handle = c_uint64()
        if engine not in ENGINES:
            raise ValueError(f"there is no engine {engine!r}, expected one of {', '.join(ENGINES)}")
        library = None if library is None else os.fsencode(library)
        accelerators = json.dumps(list(accelerators)).encode()
        threads = _whole("threads", threads, 32)
        options = _Options(sizeof(_Options), threads, library, ENGINES[engine], bool(require), accelerators, bool(low_memory))
        if isinstance(model, (bytes, bytearray, memoryview)):
            model = bytes(model)
            _check(_lib.dmd_open_bytes(model, len(model), byref(options), byref(self._handle)))
        else:
            _check(_lib.dmd_open(os.fsencode(model), byref(options), byref(self._handle)))
        info = _Info(sizeof(_Info))
        _check(_lib.dmd_describe(self._handle, byref(info)))
        self.shape = (info.channels, info.height, info.width)
        description = json.loads(_text(_lib.dmd_describe_json, self._handle))
        self.info, self.engine = description["file"], description["engine"]
        self.placement = description["placement"]
        self.classes = self.info["classes"]

    def generate(self, seed=0, labels=(), batch=None, output="u8", watch=None):
        """The pictures 0 .. `batch` of a seed.

        `labels` are class numbers or names, one for all pictures or one for each; without any, the classes in turn. `batch`
        is as many as there are labels, if it is not given. Returns, by `output`: "u8" uint8 (N, H, W, C), "rgba" uint8
        (N, H, W, 4), "f32" float32 (N, C, H, W) about [-1, 1].
        """
        labels = [labels] if isinstance(labels, (int, str)) else list(labels)
        numbers = (c_int64 * len(labels))(*[self._label(label) for label in labels])
        batch = max(1, len(labels)) if batch is None else _whole("batch", batch, 32)
        request = _Request(sizeof(_Request), _whole("seed", seed, 64), batch, numbers, len(labels))
        request.watch = 0 if watch is None else watch._handle
        channels, height, width = self.shape
        layouts = {
            "u8": (_lib.dmd_generate_u8, numpy.uint8, (batch, height, width, channels)),
            "rgba": (_lib.dmd_generate_rgba, numpy.uint8, (batch, height, width, 4)),
            "f32": (_lib.dmd_generate_f32, numpy.float32, (batch, channels, height, width)),
        }
        if output not in layouts:
            raise ValueError(f"there is no output {output!r}, expected one of {', '.join(layouts)}")
        call, dtype, shape = layouts[output]
        pictures = numpy.empty(shape, dtype)
        _check(call(self._handle, byref(request), pictures.ctypes.data, pictures.size))
        return pictures

    def run(self, noise, labels=(), seed=0):
        """Pictures float32 (N, C, H, W) of one's own unit normal noise of that shape, with one label for each where there
        are classes. `seed` is that of the noise between passes."""
        noise = numpy.ascontiguousarray(noise, numpy.float32)
        if noise.ndim != 4 or noise.shape[1:] != self.shape:
            raise ValueError(f"noise has shape {noise.shape}, expected (N, {', '.join(map(str, self.shape))})")
        numbers = (c_int64 * len(labels))(*[self._label(label) for label in labels])
        values = numpy.empty_like(noise)
        seed = _whole("seed", seed, 64)
        data = noise.ctypes.data, numbers, len(labels), seed, values.ctypes.data, values.size
        _check(_lib.dmd_run(self._handle, *data))
        return values

    def warm_up(self):
        """Runs the engine once, so that the first picture need not wait for what an engine does once."""
        _check(_lib.dmd_warm_up(self._handle))

    def close(self):
        """Frees the generator; a call on another thread goes on to its end. Closing it again does nothing."""
        handle, self._handle = self._handle, c_uint64()
        if handle.value:
            _lib.dmd_close(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "_handle", None):
            self.close()

    def _label(self, label):
        if not isinstance(label, str):
            return _whole("label", label, 63)
        found = c_int64()
        _check(_lib.dmd_find_class(self._handle, label.encode(), byref(found)))
        return found.value


class Watch:
    """Cancels the requests that are made with it, from any thread, and hears how far they are: `on_progress(done, total)`,
    in passes, on the thread that makes the pictures. What `on_progress` raises is printed, and the request goes on."""

    def __init__(self, on_progress=None):
        self._handle = c_uint64()
        self._call = _OnProgress(lambda _, done, total: on_progress(done, total)) if on_progress else _OnProgress()
        _check(_lib.dmd_open_watch(self._call, None, byref(self._handle)))

    def cancel(self):
        """Ends the requests, each after the pass that is under way, with a DmdError of status "cancelled"."""
        _check(_lib.dmd_cancel(self._handle))

    def __del__(self):
        if getattr(self, "_handle", None):
            _lib.dmd_close_watch(self._handle)


def noise(seed, index, n, purpose=PICTURE_NOISE):
    """The first `n` unit normals, float32, of the stream that docs/noise.md defines: by default those of picture `index`."""
    values = numpy.empty(_whole("n", n, 63), numpy.float32)
    stream = _whole("seed", seed, 64), _whole("purpose", purpose, 32), _whole("index", index, 64)
    _check(_lib.dmd_noise(*stream, values.ctypes.data, values.size))
    return values


def png(picture):
    """The bytes of a PNG file of one picture, uint8 (H, W, C) with 1 to 4 channels."""
    picture = numpy.ascontiguousarray(picture)
    if picture.dtype != numpy.uint8 or picture.ndim != 3:
        raise ValueError(f"a picture is uint8 (H, W, C), found {picture.dtype} {picture.shape}")
    return _bytes(_lib.dmd_png, picture.ctypes.data, *picture.shape)


def engines(library=None):
    """What can run files here: a list of dicts, with the reason of each engine that cannot."""
    return json.loads(_text(_lib.dmd_engines_json, None if library is None else os.fsencode(library)))


def _bytes(call, *args):
    size = 1 << 16
    while True:
        buffer, needed = ctypes.create_string_buffer(size), c_size_t()
        status = call(*args, buffer, size, byref(needed))
        if status != STATUSES.index("buffer_too_small"):
            _check(status)
            return buffer.raw[: needed.value]
        size = needed.value


def _text(call, *args):
    return _bytes(call, *args)[:-1].decode()


def _whole(name, value, bits):
    """ctypes cuts numbers to their size without a word."""
    number = int(value)
    if number != value or not 0 <= number < 2**bits:
        raise ValueError(f"{name} is {value}, expected a whole number from 0 to 2^{bits} - 1")
    return number


def _check(status):
    if status:
        raise DmdError(status, _lib.dmd_last_error().decode())


def _load():
    name = {"win32": "dmd_capi.dll", "darwin": "libdmd_capi.dylib"}.get(sys.platform, "libdmd_capi.so")
    beside = Path(__file__).with_name(name)
    path = os.environ.get("DMD_LIBRARY") or (str(beside) if beside.exists() else find_library("dmd_capi"))
    if path is None:
        raise ImportError(f"{name} is neither beside {__file__} nor known to the system; DMD_LIBRARY may name it")
    lib = ctypes.CDLL(path)
    handle, place, n, text = c_uint64, POINTER(c_uint64), c_size_t, c_char_p
    buffer = [c_void_p, c_size_t, POINTER(c_size_t)]
    generate = [handle, POINTER(_Request), c_void_p, n]
    for function, *arguments in [
        (lib.dmd_open, text, POINTER(_Options), place),
        (lib.dmd_open_bytes, c_char_p, n, POINTER(_Options), place),
        (lib.dmd_close, handle),
        (lib.dmd_warm_up, handle),
        (lib.dmd_describe, handle, POINTER(_Info)),
        (lib.dmd_describe_json, handle, *buffer),
        (lib.dmd_engines_json, text, *buffer),
        (lib.dmd_find_class, handle, text, POINTER(c_int64)),
        (lib.dmd_generate_f32, *generate),
        (lib.dmd_generate_u8, *generate),
        (lib.dmd_generate_rgba, *generate),
        (lib.dmd_run, handle, c_void_p, POINTER(c_int64), n, c_uint64, c_void_p, n),
        (lib.dmd_open_watch, _OnProgress, c_void_p, place),
        (lib.dmd_cancel, handle),
        (lib.dmd_close_watch, handle),
        (lib.dmd_noise, c_uint64, c_uint32, c_uint64, c_void_p, n),
        (lib.dmd_png, c_void_p, c_uint32, c_uint32, c_uint32, *buffer),
    ]:
        function.argtypes, function.restype = arguments, c_int
    lib.dmd_last_error.restype = c_char_p
    lib.dmd_abi_version.restype = c_uint32
    if lib.dmd_abi_version() != ABI_VERSION:
        raise ImportError(f"{path} has version {lib.dmd_abi_version()} of the ABI, this module is for {ABI_VERSION}")
    return lib


_lib = _load()
