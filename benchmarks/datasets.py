"""Datasets from files to tables: what real releases, hostile files and a large catalogue come to.

Run: python benchmarks/datasets.py [part ...] [--items N] [--pictures N] [--folder PATH]. Every part runs in a process of
its own, through the stages as a run has them, and ends with seconds, CPU and peak memory.

microlens   users, items and interactions of MicroLens-50k and of four of its cores (../shared/data/microlens-50k)
movielens   ratings and posters of a MovieLens release (../shared/data/movielens-posters)
pictures    some 450 hostile pictures through the images stage: how many are used, and why the others are not
records     11,900 records of seven layouts, most of them damaged: each is in a table or in rejects
json        JSON lines beside reading them with json.loads, and with one line in a thousand broken
large       a catalogue of --items, --pictures of them with one on disk, beside a thread pool that resizes as many: pictures
            a second, CPU and peak memory of both
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import polars as pl

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
PARTS = ("microlens", "movielens", "pictures", "records", "json", "large")
CORES = ((0, 0), (5, 5), (6, 5), (7, 5), (8, 5))
SHAPE = (375, 500)  # rows and columns: files of about 30 kB, as large as posters and covers are
SMALLER = 65_536  # pixels that `large` and its thread pool scale every picture down to
RECORDS = 850  # of each of the fourteen files whose records are damaged
DAMAGED = 0.7  # share of those that are
VALUES = (b"NaN", b"1e999", b"-1", b"9" * 40, b"null", b"[" * 2_000, b"{}", b"\\ud800", b"\xff\xfe", b"None", b"'")
REVIEWS = 300_000


# --- what a run does --------------------------------------------------------------------------------------------------


@contextmanager
def clocked(name: str, n: int = 0) -> Iterator[None]:
    """Print what was done meanwhile cost, the process's peak so far, and `n` pictures a second."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rate = f", {n / wall:,.0f} pictures/s" if n else ""
    print(f"{name}: {wall:.1f} s, {cpu:.1f} s of CPU, {peak():,.0f} MB at most{rate}", flush=True)


def published(
    store: Path, stages: Iterable[str], others: Mapping[str, Any] | None = None, n_pictures: int = 0, **ingest: Any
) -> dict[str, pl.DataFrame]:
    """The tables these stages publish in a new store; `ingest` and `others` as in a profile."""
    from flows.settings import load
    from tasks.runner import How
    from tasks.stage_task import perform
    from tasks.work import open_work

    values = {"settings.store": str(store), "settings.keep_images": "reference", "model": "scripted"}
    values |= {f"ingest.{name.replace('__', '.')}": value for name, value in ingest.items()} | dict(others or {})
    config = load((), [f"{name}={json.dumps(value)}" for name, value in values.items()], {})
    work, records = open_work(config.to_json()), {}
    for name in stages:
        with clocked(f"  {name}", n_pictures if name == "images" else 0):
            records[name], _ = perform(work, name, records, How(config.settings.window), {})
    made = {table: one["write_id"] for record in records.values() for table, one in record["tables"].items()}
    return {table: work.store.tables.read(table, write_id) for table, write_id in made.items()}


def counted(values: pl.Series) -> str:
    return ", ".join(f"{n:,} {value}" for value, n in values.value_counts(sort=True).iter_rows())


# --- real releases ----------------------------------------------------------------------------------------------------


def microlens(folder: Path, given: argparse.Namespace) -> None:
    path = SHARED / "microlens-50k"
    for users, items in CORES:
        tables = published(
            folder / f"{users}-{items}", ["ingest"], dataset="microlens", path=str(path), k_core=[users, items]
        )
        kept = tables["interactions"]
        counts = (kept["user_id"].n_unique(), kept["item_id"].n_unique(), kept.height)
        held = f"; {tables['waiting'].height:,} interactions wait, the catalogue has {tables['items'].height:,} items"
        print(f"({users},{items}) core: {counts[0]:,} users, {counts[1]:,} items, {counts[2]:,} interactions{held}")


def movielens(folder: Path, given: argparse.Namespace) -> None:
    path = SHARED / "movielens-posters"
    tables = published(folder, ["ingest", "images"], dataset="movielens", path=str(path))
    posters = sum(1 for _ in (path / "posters").iterdir())
    ratings = len((path / "ratings.csv").read_text().splitlines()) - 1
    print(f"{tables['interactions'].height:,} of {ratings:,} ratings, {tables['rejects'].height} rejects")
    print(f"{posters:,} posters; items by state of their picture: {counted(tables['images']['status'])}")


# --- hostile files ----------------------------------------------------------------------------------------------------


def pictures(folder: Path, given: argparse.Namespace) -> None:
    subprocess.run([sys.executable, str(ROOT / "tests/tasks/engines/hostile.py"), str(folder), "write"], check=True)
    uris = json.loads((folder / "uris.json").read_text())
    shop = folder / "pictures"
    rows = [json.dumps({"item_id": str(n), "title": "Mug", "image": uri}) for n, uri in enumerate(uris)]
    (shop / "items.jsonl").write_text("\n".join(rows))
    (shop / "clicks.csv").write_text("user_id,item_id,at\nu,0,1700000000\n")
    mapping = {"items_file": "items.jsonl", "interactions_file": "clicks.csv", "item_columns": {"image": "image"}}
    columns = {f"generic__{key}": value for key, value in mapping.items() if key != "item_columns"}
    tables = published(
        folder / "store",
        ["ingest", "images"],
        dataset="generic",
        path=str(shop),
        generic__item_columns__image="image",
        **columns,
    )
    found = tables["images"]
    assert found.height == len(uris), "a picture is lost"
    silent = found.filter(pl.col("status") != "ok", pl.col("detail").is_null(), pl.col("ask").is_not_null()).height
    print(f"{len(uris)} pictures: {counted(found['status'])}; {silent} of them without a reason")
    why = (
        pl.col("detail")
        .str.replace(r"^.*\.[a-z]{3,4}:? ", "")
        .str.replace_all(r"\S*/\S*|\d[\d,]*", "…")
        .str.slice(0, 60)
        .str.strip_chars(" :.")
    )
    for status, reason, n in (
        found.filter(pl.col("status") != "ok")
        .group_by("status", why)
        .len()
        .sort("len", "status", descending=True)
        .iter_rows()
    ):
        print(f"  {n:>4} {status:<11} {reason or 'no URI'}")


def records(folder: Path, given: argparse.Namespace) -> None:
    """Each layout's two files, most of their lines damaged: lines = rows in tables + rejects, file by file."""
    chance, total = random.Random(1), 0
    for name, (params, header, items, clicks) in layouts().items():
        shop = folder / name.replace(" ", "-")
        shop.mkdir()
        expected = {}
        for file, lines in (items, clicks):
            delimited = '"' not in lines[0]
            broken = [
                damaged(line, chance, delimited) if chance.random() < DAMAGED else line.encode() for line in lines
            ]
            text = b"\n".join([line.encode() for line in header.get(file, ())] + broken)
            (shop / file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)
            expected[file] = len(lines)
        tables = published(folder / f"{shop.name}-store", ["ingest"], path=str(shop), **params)
        assert tables["rejects"].select("source", "line").is_unique().all()
        rejects = dict(tables["rejects"]["source"].value_counts().iter_rows())
        used = {items[0]: tables["items"].height, clicks[0]: tables["interactions"].height + tables["waiting"].height}
        for file, n in expected.items():
            lost = n - used[file] - rejects.get(file, 0)
            print(
                f"  {name:<14}{file:<22}{n:>6} records:{used[file]:>5} used,{rejects.get(file, 0):>5} rejects,{lost:>3} lost"
            )
            assert not lost, "a record is in no table"
            total += n
    print(f"{total:,} records, {100 * DAMAGED:.0f} % of them damaged, and none of them lost")


def layouts() -> Mapping[str, tuple[dict[str, Any], dict[str, list[str]], Any, Any]]:
    """By name: parameters of ingest, header lines by file, and the (name, lines) of items and of interactions."""
    ids = range(RECORDS)
    at = [1_500_000_000 + 1_000 * n for n in ids]
    own = {"dataset": "generic", "generic__liked_from": 4.0, "generic__interaction_columns__rating": "stars"}
    reviews = {
        "2014": [{"reviewerID": f"A{n % 90}", "asin": f"B{n}", "overall": 5.0, "unixReviewTime": at[n]} for n in ids],
        "2023": [
            {"user_id": f"A{n % 90}", "parent_asin": f"B{n}", "rating": 5.0, "timestamp": at[n] * 1_000} for n in ids
        ],
    }
    meta = {
        "2014": [{"asin": f"B{n}", "title": f"Mug {n}", "price": 3.17, "categories": [["Home", "Mugs"]]} for n in ids],
        "2018": [
            {"asin": f"B{n}", "title": f"Mug {n}", "price": "$3.17", "imageURLHighRes": ["https://a/b.jpg"]}
            for n in ids
        ],
        "2023": [{"parent_asin": f"B{n}", "title": f"Mug {n}", "images": [{"large": "https://a/b.jpg"}]} for n in ids],
    }
    amazon = {
        f"amazon {year}": (
            {"dataset": "amazon", "amazon__version": year, "amazon__reviews_file": r, "amazon__meta_file": m},
            {},
            (m, [repr(row) if year == "2014" else json.dumps(row) for row in meta[year]]),
            (r, [json.dumps(row) for row in reviews["2023" if year == "2023" else "2014"]]),
        )
        for year, r, m in (("2014", "r.json.gz", "m.json.gz"), ("2018", "r.json", "m.json"), ("2023", "r.jsonl", "m.jsonl"))
    }  # fmt: skip
    own_items = [{"item_id": str(n), "title": f"Mug {n}", "words": ["a", "b"]} for n in ids]
    own_clicks = [{"user_id": f"u{n % 90}", "item_id": str(n), "at": at[n], "stars": 4.5} for n in ids]
    return {
        **amazon,
        "generic jsonl": (
            own
            | {"generic__items_file": "i.jsonl", "generic__interactions_file": "c.jsonl"}
            | {"generic__item_columns__description": "words"},
            {},
            ("i.jsonl", [json.dumps(row) for row in own_items]),
            ("c.jsonl", [json.dumps(row) for row in own_clicks]),
        ),
        "generic csv": (
            {**own, "generic__items_file": "i.csv", "generic__interactions_file": "c.csv"},
            {"i.csv": ["item_id,title"], "c.csv": ["user_id,item_id,at,stars"]},
            ("i.csv", [f"{n},Mug {n}" for n in ids]),
            ("c.csv", [f"u{n % 90},{n},{at[n]},4.5" for n in ids]),
        ),
        "movielens": (
            {"dataset": "movielens"},
            {"movies.csv": ["movieId,title,genres"], "ratings.csv": ["userId,movieId,rating,timestamp"]},
            ("movies.csv", [f"{n},Up ({n}),Comedy|Drama" for n in ids]),
            ("ratings.csv", [f"{n % 90},{n},4.5,{at[n]}" for n in ids]),
        ),
        "microlens": (
            {"dataset": "microlens"},
            {"M_titles.csv": ["item,title"], "M_pairs.csv": ["user,item,timestamp"]},
            ("M_titles.csv", [f"{n},A funny ending {n}" for n in ids]),
            ("M_pairs.csv", [f"{n % 90},{n},{at[n] * 1_000}" for n in ids]),
        ),
    }  # fmt: skip


def damaged(line: str, chance: random.Random, delimited: bool) -> bytes:
    """The line cut, or with bytes or a value put in, changed or taken out; never blank, and still one line.

    In delimited text no quote is put in: the lines behind it would be one record with it.
    """
    content = line.encode()
    at, n = chance.randrange(len(content)), chance.randrange(1, 9)
    junk = bytes(chance.randrange(256) for _ in range(n))
    value = chance.choice(
        [b"NaN", b"1e999", b"-1", b"9" * 40, b"null", b"[" * 2_000, b"{}", b"\\ud800", b"\xff\xfe", b"None", b"'"]
    )
    numbers = [place for place, letter in enumerate(content) if chr(letter).isdigit()]
    of = chance.choice(numbers) if numbers else at
    content = chance.choice(
        [
            content[: at + 1],
            content[:at] + junk + content[at:],
            content[:at] + junk + content[at + n :],
            content[:at] + content[at + n :],
            content[:of] + value + content[of + 1 :],
            content + content,
        ]
    )
    for byte in b"\n\r" + (b'"' if delimited else b""):
        content = content.replace(bytes([byte]), b"?")
    return content if content.decode("utf-8", "replace").strip() else b"x"


# --- size -------------------------------------------------------------------------------------------------------------


def json_part(folder: Path, given: argparse.Namespace) -> None:
    from storage.source import FsspecSource

    chance = random.Random(1)
    words = "great mug bought this for my husband and it is fine café handle broke".split()
    said = " ".join(chance.choices(words, k=4_000))
    rows = []
    for n in range(REVIEWS):
        begin, length = chance.randrange(5_000), chance.randrange(100, 900)
        row = {"rating": 5.0, "title": said[begin : begin + 30], "text": said[begin : begin + length], "images": []}
        row |= {"asin": f"B{n % 20_000}", "parent_asin": f"B{n % 20_000}", "user_id": f"A{chance.randrange(60_000)}"}
        rows.append(json.dumps(row | {"timestamp": 1_400_000_000_000 + n, "verified_purchase": True}))
    (folder / "sound.jsonl").write_text("\n".join(rows))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), 1))
    (folder / "broken.jsonl").write_text("\n".join(row[:-1] if n % 1_000 == 7 else row for n, row in enumerate(rows)))
    columns = {"user_id": "user_id", "item_id": "parent_asin", "at": "timestamp", "rating": "rating"}
    print(f"{REVIEWS:,} reviews, {(folder / 'sound.jsonl').stat().st_size / 1e6:.0f} MB")
    for name in ("sound.jsonl", "packed.jsonl.gz", "broken.jsonl"):
        began = time.process_time()
        frame, rejects = FsspecSource(str(folder)).table(name, columns)
        spent = time.process_time() - began
        print(f"  {name:<18}{frame.height / spent:>10,.0f} records a second of CPU, {rejects.height} rejects")
        del frame
    began = time.process_time()
    with (folder / "sound.jsonl").open("rb") as file:
        kept = [[row[theirs] for theirs in columns.values()] for row in map(json.loads, file)]
    print(f"  {'json.loads alone':<18}{len(kept) / (time.process_time() - began):>10,.0f} records a second of CPU")


def large(folder: Path, given: argparse.Namespace) -> None:
    """Ingest, then the images stage, which does more than the pool.

    It lists versions, checks every picture before it is decoded, scales it to SMALLER pixels and writes a JPEG, names both
    by sha256, syncs copies and answers to disk, and publishes a row for each item.
    """
    from mllmsrec_core.stages.images import SHOWING

    shop, n = folder / "shop", given.pictures
    tables = published(
        folder / "store",
        ["ingest", "images"],
        {f"{stage}.max_pixels": SMALLER for stage in SHOWING},
        n,
        dataset="generic",
        path=str(shop),
        generic__items_file="items.parquet",
        generic__interactions_file="clicks.parquet",
        generic__item_columns__image="image",
    )
    print(f"{tables['items'].height:,} items; pictures: {counted(tables['images']['status'])}")
    ok = tables["images"].filter(status="ok")
    assert ok.height == n
    assert (ok["sha256"] != ok["original_sha256"]).all(), "each was scaled down"


def make_large(shop: Path, items: int, n: int) -> None:
    """items.parquet, clicks.parquet and the pictures, a thousand in a folder; no two files are the same."""
    from benchmarks.images import motif

    motifs = [motif(seed, SHAPE) for seed in range(16)]
    place = pl.format("p{}/{}.jpg", pl.col("n") // 1_000, "n")
    rows = pl.select(n=pl.int_range(items)).with_columns(image=pl.when(pl.col("n") < n).then(place))
    ids = rows.with_columns(item_id=pl.format("B{}", "n"), title=pl.format("A plain product called {}", "n"))
    shop.mkdir(parents=True)
    ids.select("item_id", "title", "image").write_parquet(shop / "items.parquet")
    clicks = rows.select(
        user_id=pl.format("u{}", pl.col("n") % 50_000), item_id=ids["item_id"], at=1_600_000_000 + pl.col("n")
    )
    clicks.write_parquet(shop / "clicks.parquet")
    for number in range(n):
        folder = shop / f"p{number // 1_000}"
        if number % 1_000 == 0:
            folder.mkdir()
        content, said = motifs[number % len(motifs)], f"{number:08d}".encode()
        (folder / f"{number}.jpg").write_bytes(content[:2] + b"\xff\xfe\x00\x0a" + said + content[2:])
    size = sum(len(one) for one in motifs) / len(motifs) / 1e3
    print(f"{items:,} items, {n:,} pictures of {SHAPE[1]} x {SHAPE[0]} and {size:.0f} kB")


def pool(folder: Path, given: argparse.Namespace) -> None:
    """What img2dataset does with bytes that are here: decode, scale down, write a JPEG; to the size and quality of ours.

    Nothing is checked, named, recorded or synced.
    """
    import io
    import math

    from PIL import Image

    resized = folder / "resized"
    resized.mkdir()

    def one(path: Path) -> None:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        scale = math.sqrt(SMALLER / (image.width * image.height))
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        image.save(resized / path.name, "JPEG", quality=95, subsampling="4:4:4")

    with ThreadPoolExecutor(16) as threads:
        done = len(list(threads.map(one, sorted((folder / "shop").glob("p*/*.jpg")))))
    print(f"  thread pool: {done:,} pictures resized")


SIDES: Mapping[str, Callable[[Path, argparse.Namespace], None]] = {
    "microlens": microlens,
    "movielens": movielens,
    "pictures": pictures,
    "records": records,
    "json": json_part,
    "large": large,
    "pool": pool,
}


def peak() -> float:
    """MB this process has held at most; what it was started by does not count."""
    from tests.tasks.engines.hostile import peak

    return peak() / 1e6


def one_side(name: str, folder: Path, given: argparse.Namespace) -> None:
    """Runs in a process of its own; prints what it cost, imports left out."""
    import tasks.stage_task
    import tasks.work  # noqa: F401

    with clocked(name, given.pictures if name == "pool" else 0):
        SIDES[name](folder, given)


def main(given: argparse.Namespace) -> None:
    if given.side:
        one_side(given.side, given.folder, given)
        return
    for part in given.parts or PARTS:
        if part in ("microlens", "movielens") and not SHARED.exists():
            print(f"{part}: left out, {SHARED} is not beside the repository")
            continue
        with tempfile.TemporaryDirectory(dir=given.folder) as place:
            if part == "large":
                make_large(Path(place) / "shop", given.items, given.pictures)
            for side in ("large", "pool") if part == "large" else (part,):
                numbers = ["--items", str(given.items), "--pictures", str(given.pictures)]
                command = [sys.executable, __file__, "--side", side, "--folder", place, *numbers]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, default=None, help="where files and stores are made, and removed again")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    main(parser.parse_args())
