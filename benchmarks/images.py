"""The images stage beside a plain thread pool that reads, decodes and resizes the same pictures from disk.

Run: python benchmarks/images.py [pictures]. Each side runs in a process of its own, in turn, and prints pictures a second,
CPU and peak memory; ours also names every picture by its sha256, keeps it durably in a store (a copy, or a reference),
records every answer and publishes a table. The pool decodes at full size before it resizes; ours draws a JPEG at an eighth
of its sides, which reads every byte of it all the same. Last comes one large picture: what its decoding costs.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import polars as pl
from PIL import Image

SIDES = ("thread pool", "ours, by reference", "ours, copied")
SHAPE = (600, 800)  # rows and columns; with it a file has about 80 kB, as product pictures do
RESIZED = 256  # pixels of the longer side, img2dataset's default
THREADS = 16
DIFFERENT = 16  # motifs; every file is told from the others by a comment


def motif(seed: int, shape: tuple[int, int] = SHAPE) -> bytes:
    """A JPEG of soft shapes with some grain."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (shape[1], shape[0]), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 6, (shape[0], shape[1], 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def make(folder: Path, n: int) -> None:
    motifs = [motif(seed) for seed in range(min(n, DIFFERENT))]
    for number in range(n):
        said = f"{number:08d}".encode()
        content = motifs[number % len(motifs)]
        (folder / f"{number:08d}.jpg").write_bytes(content[:2] + b"\xff\xfe\x00\x0a" + said + content[2:])


def pool(folder: Path, n: int) -> int:
    def one(path: Path) -> int:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        scale = RESIZED / max(image.size)
        return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).width

    with ThreadPoolExecutor(THREADS) as threads:
        return len(list(threads.map(one, sorted(folder.glob("*.jpg")))))


def ours(folder: Path, n: int, keep: str) -> int:
    from mllmsrec_core.stage import Inputs
    from mllmsrec_core.stages import STAGES, images
    from storage.source import FsspecSource
    from storage.store import Store
    from tasks.engines.fetch import FetchEngine
    from tasks.run_stage import run_stage
    from tasks.runner import How

    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        store, source = Store(place), FsspecSource(str(folder))
        items = pl.DataFrame({"item_id": source.names()}).with_columns(
            image_uri=pl.format("{}/{}", pl.lit(str(folder)), "item_id"), image_version=pl.lit(None, pl.String)
        )
        params = {stage.name: stage.params() for stage in STAGES}
        inputs = Inputs({"items": items}, params, versions=source.versions)
        engine = FetchEngine(store.blobs, allow_roots=[str(folder)], keep=keep)  # type: ignore[arg-type]
        parts = {"params": {}, "model": None, "code": ""}
        record = run_stage(store, images.STAGE, inputs, parts, lambda ask: engine, How())
        made = store.tables.read("images", record["tables"]["images"]["write_id"])
        return len(made.filter(pl.col("status") == "ok"))


def one_side(name: str, folder: Path, n: int) -> None:
    """Runs in a process of its own; prints what it cost, imports left out."""
    import storage.store  # noqa: F401
    import tasks.engines.fetch
    import tasks.run_stage  # noqa: F401

    wall, cpu = time.perf_counter(), time.process_time()
    done = pool(folder, n) if name == SIDES[0] else ours(folder, n, "reference" if "reference" in name else "copy")
    assert done == n, f"{done} of {n} pictures came"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kB to MB
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, peak]))


def large() -> None:
    """Milliseconds of CPU for one picture of 4,000 x 3,000: checked once, and decoded for each step of a model."""
    from tasks.engines.pictures import check, decode, reduced

    content = motif(0, (3_000, 4_000))
    copy, _ = reduced(content, 500_000)
    small = motif(0, (600, 800))
    for label, work in (
        ("checked", lambda: check(content)),
        ("decoded to 0.5 million pixels", lambda: decode(content, 500_000)),
        ("made smaller once, when it comes", lambda: reduced(content, 500_000)),
        (f"that copy of {len(copy) / 1e6:.1f} MB decoded", lambda: decode(copy, 500_000)),
        ("decoded whole", lambda: decode(content)),
        ("800 x 600 decoded", lambda: decode(small, 500_000)),
    ):
        started = time.process_time()
        for _ in range(5):
            work()
        print(f"4000 x 3000, {len(content) / 1e6:.1f} MB: {label}: {(time.process_time() - started) / 5 * 1e3:.0f} ms")


def main(n: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        folder.mkdir()
        make(folder, n)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{n:,} pictures of {size / n / 1e3:.0f} kB")
        cost: dict[str, list[float]] = {}
        for name in SIDES:
            command = [sys.executable, __file__, "--side", name, str(folder), str(n)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            wall, cpu, peak = cost[name] = json.loads(said.splitlines()[-1])
            print(f"{name:<20}{n / wall:>8.0f} pictures/s{cpu / n * 1e3:>8.2f} ms of CPU each{peak:>7.0f} MB at most")
        for name in SIDES[1:]:
            wall, cpu, peak = (mine / plain for mine, plain in zip(cost[name], cost[SIDES[0]], strict=True))
            print(f"{name} / {SIDES[0]}: {wall:.2f} of the time, {cpu:.2f} of the CPU, {peak:.2f} of the memory")
    large()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        one_side(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000)
