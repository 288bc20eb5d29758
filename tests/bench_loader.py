"""python tests/bench_loader.py -- reading JPEGs in full and as a draft; a list of a million images.

Prints images/s on one core by size, with their mean difference in gray levels (0 .. 255), then
seconds and memory of data.load for a list of a million files, and what it adds to a worker that
reads all of it. Everything is made in a temporary folder; --list-only skips the JPEGs.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

SIZES = {"500 px": (500, 375), "1 MP": (1155, 866), "12 MP": (4000, 3000)}
ROUNDS, NUM_IMAGES, PER_FOLDER = 15, 1_000_000, 1000


def bench_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        pixels = np.zeros((size[1], size[0], 3), np.float32)
        for cells in (4, 16, 64, 256):  # detail of all sizes, as in photos
            noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) / 4
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "x.jpg", quality=90)
        samples = [data.Sample("x.jpg", 0)]
        lists = [data.ImageList(samples, folder, draft=draft) for draft in (False, True)]
        exact, draft = (images[0][0].float() for images in lists)
        pairs = [[seconds_of(images) for images in lists] for _ in range(ROUNDS)]
        before, after = (statistics.median(column) for column in zip(*pairs))
        print(
            f"{name}: in full {1 / before:.1f} images/s, draft {1 / after:.1f}, ratio "
            f"{statistics.median(a / b for a, b in pairs):.2f}; difference "
            f"{(exact - draft).abs().mean():.2f} gray levels"
        )


def seconds_of(images: data.ImageList) -> float:
    start_time = time.process_time()
    images[0]
    return time.process_time() - start_time


LOAD = """
start_time, start_cpu = time.perf_counter(), time.process_time()
start = memory("status", "VmRSS")
task = data.load(sys.argv[1])
seconds, peak = time.perf_counter() - start_time, memory("status", "VmHWM") - start
print(f"{sum(map(len, (task.train, task.val, task.test))):,} images: {seconds:.1f} s "
      f"({time.process_time() - start_cpu:.1f} s of the core), at most {peak:.0f} MB")
"""
WORKER = """
images = data.ImageList(task.train, task.root)
for name, samples in (("the list", images.samples), ("the same as objects", list(images.samples))):
    gc.collect()
    sys.stdout.flush()
    if os.fork() == 0:
        gc.disable()
        start = memory("smaps_rollup", "Private_Dirty")
        for i in range(len(samples)):
            path, label = samples[i]
        print(f"a worker that reads all of {name} grows by "
              f"{memory('smaps_rollup', 'Private_Dirty') - start:.0f} MB", flush=True)
        os._exit(0)
    os.wait()
"""
MEMORY = """
import gc, os, re, sys, time
import torch, data
def memory(file, entry):
    return int(re.search(entry + r":\\s+(\\d+)", open(f"/proc/self/{file}").read())[1]) / 1024
"""


def bench_list(folder: Path) -> None:
    with open(folder / "train.txt", "w") as file:
        for i in range(NUM_IMAGES):
            path = f"folder {i // PER_FOLDER:04d}/image_{i:08d}.jpg"
            if i % PER_FOLDER == 0:
                (folder / path).parent.mkdir()
            os.close(os.open(folder / path, os.O_CREAT))
            file.write(f"{path} {i % 50}\n")
    command = [sys.executable, "-c", MEMORY + LOAD + WORKER, str(folder)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)


def main() -> None:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    print(f"{cpu[1] if cpu else 'unknown processor'}, {os.cpu_count()} cores, Pillow", end=" ")
    print(f"{Image.__version__}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        if "--list-only" not in sys.argv:
            bench_images(Path(folder))
        (Path(folder) / "list").mkdir()
        bench_list(Path(folder) / "list")


if __name__ == "__main__":
    main()
