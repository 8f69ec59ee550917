"""python -m unittest, with DMD_FIXTURES naming runtime/tests/fixtures, where the package is installed."""

import os
import threading
import unittest
from pathlib import Path

import numpy

from dmd_runtime import DmdError, Generator, Watch, engines, noise, png

FIXTURES = Path(os.environ["DMD_FIXTURES"])


class Pictures(unittest.TestCase):
    def test_a_seed_makes_the_pictures_of_record(self):
        # onnxruntime 1.32.0 in a loop of numpy: see runtime/tests/runtime.rs, a_file_of_several_passes_runs_them_all.
        expected = [-0.54790473, -0.6076405, -0.49089473, -0.29027638, -0.40598375, -0.46325982]
        generator = Generator(FIXTURES / "steps-f32.onnx")
        values = generator.generate(seed=2**33 + 5, labels=[1, 0], output="f32")
        self.assertEqual((values.shape, values.dtype), ((2, 1, 8, 6), numpy.float32))
        numpy.testing.assert_allclose(values.ravel()[:6], expected, atol=1e-5)
        self.assertAlmostEqual(float(numpy.abs(values).sum()), 39.054005, delta=1e-3)

    def test_layouts_hold_the_same_picture(self):
        with Generator(FIXTURES / "classes-f32.onnx", engine="tract", threads=1) as generator:
            values = generator.generate(seed=7, batch=3, output="f32")
            pixels = generator.generate(seed=7, batch=3)
            rgba = generator.generate(seed=7, batch=3, output="rgba")
        self.assertEqual((pixels.shape, rgba.shape), ((3, 8, 6, 3), (3, 8, 6, 4)))
        rounded = numpy.floor(numpy.clip(values * numpy.float32(127.5) + 128, 0, 255)).transpose(0, 2, 3, 1)
        numpy.testing.assert_array_equal(pixels, rounded)
        numpy.testing.assert_array_equal(rgba[..., :3], pixels)
        self.assertTrue((rgba[..., 3] == 255).all())

    def test_a_file_and_its_bytes_and_own_noise_make_the_same_picture(self):
        path = FIXTURES / "classes-f32.onnx"
        first, second = Generator(path), Generator(path.read_bytes())
        name = first.classes[2]
        expected = first.generate(seed=5, labels=name, output="f32")
        numpy.testing.assert_array_equal(second.generate(seed=5, labels=[2], output="f32"), expected)
        own = noise(5, 0, numpy.prod(first.shape)).reshape(1, *first.shape)
        numpy.testing.assert_array_equal(first.run(own, [name]), expected)

    def test_a_png_begins_as_one_and_threads_share_a_generator(self):
        generator = Generator(FIXTURES / "classes-u8.onnx")
        expected, found = generator.generate(seed=3, batch=8), []
        threads = [threading.Thread(target=lambda: found.append(generator.generate(seed=3, batch=8))) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        self.assertEqual(len(found), 4)
        [numpy.testing.assert_array_equal(pictures, expected) for pictures in found]
        self.assertEqual(png(expected[0])[:8], b"\x89PNG\r\n\x1a\n")

    def test_a_watch_hears_and_cancels(self):
        generator, heard = Generator(FIXTURES / "steps-f32.onnx"), []
        generator.generate(batch=2, watch=Watch(lambda done, total: heard.append((done, total))))
        self.assertEqual(heard, [(0, 6), (2, 6), (4, 6), (6, 6)])
        watch = Watch()
        watch.cancel()
        with self.assertRaises(DmdError) as raised:
            generator.generate(watch=watch)
        self.assertEqual(raised.exception.status, "cancelled")

    def test_what_is_wrong_is_said(self):
        generator = Generator(FIXTURES / "classes-f32.onnx")
        for call, kind, part in [
            (lambda: Generator("missing.onnx"), "bad_file", "missing.onnx: No such file"),
            (lambda: Generator(b"no model"), "bad_file", "the model in memory"),
            (lambda: Generator(FIXTURES / "foreign.onnx"), "bad_file", "not one of ours"),
            (lambda: Generator(FIXTURES / "plain-f32.onnx", library="/nowhere"), "no_engine", "/nowhere"),
            (lambda: generator.generate(labels=[3]), "bad_request", "label 3 is not a class of this file"),
            (lambda: generator.generate(labels="nobody"), "bad_request", 'no class of this file is named "nobody"'),
            (lambda: generator.generate(labels=[0, 1], batch=3), "bad_request", "found 2 labels, expected none, 1 or 3"),
            (lambda: generator.generate(batch=0), "bad_request", "batch is 0"),
        ]:
            with self.assertRaises(DmdError) as raised:
                call()
            self.assertEqual(raised.exception.status, kind)
            self.assertIn(part, str(raised.exception))
        for call in [
            lambda: Generator("x", engine="fast"),
            lambda: Generator("x", threads=-1),
            lambda: generator.generate(seed=2**64),
            lambda: generator.generate(output="jpeg"),
            lambda: generator.run(numpy.zeros((1, 3, 8, 7))),
            lambda: png(numpy.zeros((8, 6, 3))),
        ]:
            self.assertRaises(ValueError, call)
        generator.close()
        generator.close()
        with self.assertRaises(DmdError) as raised:
            generator.generate()
        self.assertEqual(raised.exception.status, "bad_handle")

    def test_accelerators_that_are_not_here_are_passed_over(self):
        generator = Generator(FIXTURES / "plain-f32.onnx", accelerators=[{"core_ml": {}}, {"direct_ml": {"device": 0}}])
        self.assertEqual(len(generator.placement["passed_over"]), 2)
        with self.assertRaises(DmdError) as raised:
            Generator(FIXTURES / "plain-f32.onnx", accelerators=[{"core_ml": {}}], require=True)
        self.assertEqual(raised.exception.status, "no_engine")
        with self.assertRaises(DmdError) as raised:
            Generator(FIXTURES / "plain-f32.onnx", accelerators=["warp"])
        self.assertIn("unknown variant `warp`", str(raised.exception))

    def test_engines_are_listed_with_reasons(self):
        self.assertEqual({engine["kind"] for engine in engines()}, {"onnxruntime", "tract"})
        self.assertIn("/nowhere", engines("/nowhere")[0]["reason"])


if __name__ == "__main__":
    unittest.main()
