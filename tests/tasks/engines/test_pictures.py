"""Decoding pictures, sound and hostile ones."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mllmsrec_core.errors import ImageRefused, ImageUnreadable
from tasks.engines import pictures
from tasks.engines.pictures import check, decode, reduced, rgb

HOSTILE = Path(__file__).parent / "hostile.py"
GIGABYTE = 1_000_000_000


def encoded(picture: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def test_pictures_are_turned_upright_by_their_exif_tag() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    assert decode(encoded(Image.new("RGB", (30, 10)), "JPEG", exif=exif)).size == (10, 30)


def test_transparent_pixels_become_white() -> None:
    assert decode(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(100, 50), (3, 2000), (2000, 3), (101, 99), (1, 9000), (9000, 1), (2, 70_000)])
def test_large_pictures_shrink_to_max_pixels_and_keep_their_aspect(size: tuple[int, int]) -> None:
    small = decode(encoded(Image.new("L", size)), max_pixels=1000)
    assert small.mode == "RGB"
    assert 0 < small.width * small.height <= 1000
    if min(small.size) > 10:
        assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.1)


def test_small_pictures_are_left_as_they_are() -> None:
    assert decode(encoded(Image.new("RGB", (10, 10))), max_pixels=1000).size == (10, 10)


# What a picture may be saved as: (format, mode), with options that keep its pixels where the format can.
LOSSLESS = [
    *(("PNG", mode) for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "I;16")),
    *(("TIFF", mode) for mode in ("RGB", "CMYK", "I;16", "F")),
    *(("BMP", "RGB"), ("GIF", "P"), ("WEBP", "RGB"), ("WEBP", "RGBA")),
]
LOSSY = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("AVIF", "RGB")]
SIZES = st.tuples(st.integers(1, 150), st.integers(1, 150))
PHOTOS = st.tuples(st.integers(90, 240), st.integers(90, 240))  # of few pixels all is grain, which no JPEG keeps


def photo(size: tuple[int, int], mode: str, seed: int) -> Image.Image:
    """Soft shapes with some grain, as product photos have."""
    rng = np.random.default_rng(seed)
    bands = {"RGBA": 4, "LA": 2, "CMYK": 4, "RGB": 3, "P": 3}.get(mode, 1)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)) for _ in range(bands)]
    soft = [np.asarray(band.resize(size, Image.Resampling.BICUBIC)) for band in coarse]
    grainy = np.clip(np.stack(soft, -1) + rng.normal(0, 4, (size[1], size[0], bands)), 0, 255).astype(np.uint8)
    if mode == "CMYK":
        return Image.merge("CMYK", [Image.fromarray(grainy[:, :, band]) for band in range(4)])
    if mode in ("I;16", "F"):
        return Image.fromarray(grainy[:, :, 0].astype(np.uint16 if mode == "I;16" else np.float32) * 257)
    picture = Image.fromarray(grainy.squeeze(-1) if bands == 1 else grainy)
    return picture.quantize(64) if mode == "P" else picture.convert(mode)


def exif_of(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def aspect_is_kept(size: tuple[int, int], original: tuple[int, int]) -> bool:
    """Within one pixel of a side; sides of less than one pixel are drawn as one."""
    (width, height), (whole_width, whole_height) = size, original
    return min(size) == 1 or abs(width - height * whole_width / whole_height) <= max(1, whole_width / whole_height) + 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(LOSSLESS), SIZES, st.integers(1, 8), st.integers(0, 99), st.floats(0.02, 0.99))
def test_a_copy_of_exact_pixels_shows_what_the_original_shows(
    form: tuple[str, str], size: tuple[int, int], turn: int, seed: int, share: float
) -> None:
    kind, mode = form
    how = {"lossless": True} if kind == "WEBP" else {"exif": exif_of(turn)} if kind in ("PNG", "TIFF") else {}
    content = encoded(photo(size, mode, seed), kind, **how)
    most = max(1, int(size[0] * size[1] * share))
    copy, shown = reduced(content, most)
    assert shown == check(copy) and shown[0] * shown[1] <= most
    assert decode(copy, most).tobytes() == decode(copy).tobytes() == decode(content, most).tobytes()
    assert aspect_is_kept(shown, decode(content).size)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(LOSSY), PHOTOS, st.integers(1, 8), st.integers(0, 99), st.floats(0.2, 0.99))
def test_a_copy_of_a_lossy_picture_is_a_jpeg_that_shows_nearly_the_same(
    form: tuple[str, str], size: tuple[int, int], turn: int, seed: int, share: float
) -> None:
    kind, mode = form
    content = encoded(photo(size, mode, seed), kind, quality=90, exif=exif_of(turn))
    most = max(1, int(size[0] * size[1] * share))
    copy, shown = reduced(content, most)
    seen, wanted = decode(copy, most), decode(content, most)
    assert copy.startswith(b"\xff\xd8") and seen.size == wanted.size == shown == check(copy)
    assert shown[0] * shown[1] <= most and aspect_is_kept(shown, decode(content).size)
    assert np.abs(np.asarray(seen, np.int16) - np.asarray(wanted, np.int16)).mean() < 2


def test_a_copy_is_the_same_whenever_it_is_made_and_holds_no_metadata() -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"  # the description
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        extra = {"comment": b"taken at home"} if kind == "JPEG" else {}
        content = encoded(
            photo((80, 60), "RGB", 0), kind, exif=exif, icc_profile=b"taken at home", dpi=(300, 300), **extra
        )
        assert b"taken at home" in content
        copy, _ = reduced(content, 1_000)
        assert copy == reduced(content, 1_000)[0]
        with Image.open(io.BytesIO(copy)) as kept:
            assert not kept.getexif() and b"taken at home" not in copy
            assert "icc_profile" not in kept.info and kept.format in ("JPEG", "PNG")


@pytest.mark.parametrize("cut", [0, 20, 60])
def test_bytes_that_are_no_whole_picture_are_unreadable(cut: int) -> None:
    with pytest.raises(ImageUnreadable):
        decode(encoded(Image.effect_noise((20, 20), 50))[:cut])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "I", "F"])
def test_pixels_are_the_same_however_many_are_converted_at_a_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = {"RGBA": 4, "LA": 2}.get(mode, 1)
    values = np.random.default_rng(0).integers(0, 256, (37, 41, bands), dtype=np.uint8).squeeze()
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    picture = Image.fromarray(values.astype(kinds[mode]) * 200 if mode in kinds else values)
    if mode == "P":
        picture = picture.convert("RGB").quantize(16)
        picture.info["transparency"] = 3
    whole = rgb(picture)
    monkeypatch.setattr(pictures, "STRIP", 100)
    assert rgb(picture).tobytes() == whole.tobytes()
    assert len(set(whole.tobytes())) > 2


@pytest.mark.parametrize(
    ("kind", "mode", "most"),
    [
        ("PNG", "L", 36_363_636),
        ("GIF", "L", 36_363_636),
        ("TIFF", "L", 30_769_230),
        ("AVIF", "RGB", 32_000_000),
        ("WEBP", "RGB", 24_242_424),
        ("JPEG", "CMYK", 50_000_000),
        ("JPEG", "RGB", 64_000_000),
    ],
)
def test_how_many_pixels_are_read_follows_what_a_format_takes_of_memory(
    kind: str, mode: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MEMORY", pictures.MEMORY // 10_000)
    with pytest.raises(ImageRefused, match=f"more than {most // 10_000:,} pixels"):
        check(encoded(Image.new(mode, (100, 65)), kind), max_pixels=6_400)
    assert check(encoded(Image.new(mode, (100, 24)), kind), max_pixels=6_400) == (100, 24)


def test_a_jpeg_drawn_in_endless_scans_is_refused() -> None:
    content = encoded(Image.effect_noise((64, 64), 50), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    assert check(content[:-2] + scan * 50 + content[-2:]) == (64, 64)
    for read in (check, decode):
        with pytest.raises(ImageRefused, match="more than 100 scans"):
            read(content[:-2] + scan * 200 + content[-2:])


def test_what_a_camera_appended_or_embedded_is_no_scan() -> None:
    content = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    film = b"\xff\xda\x00\x02" * 5_000
    assert check(content + film) == (64, 64)
    embedded = b"\xff\xe5" + (50_002).to_bytes(2, "big") + (b"\xff\xda" * 25_000)
    assert check(content[:2] + embedded + content[2:]) == (64, 64)


def test_the_same_bytes_fail_with_the_same_words() -> None:
    said = set()
    for _ in range(3):
        with pytest.raises(ImageUnreadable) as error:
            check(b"no picture" * 9)
        said.add(str(error.value))
    assert len(said) == 1, "the words stand in a table whose digest says whether anything changed"


def test_every_hostile_picture_is_used_or_refused_with_a_reason_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    def run(what: str) -> str:
        command = [sys.executable, str(HOSTILE), str(tmp_path), what]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout

    run("write")
    result = json.loads(run("read"))
    found = {uri.removeprefix(f"{tmp_path}/pictures/"): (state, why) for uri, state, why in result["found"]}
    assert len(found) >= 400
    states = Counter(state for state, _ in found.values())
    assert set(states) == {"ok", "image_missing", "image_unreadable", "image_refused"}
    assert all(why for _, why in found.values())
    assert result["peak"] < GIGABYTE
    for name, (state, why) in found.items():
        if "claims 60000" in name or "claims 2147483647" in name or "400 million" in name:
            assert state == "image_refused", (name, why)
        if "as many" in name or name.endswith("end.png"):
            assert state == "ok", (name, why)
        if " cut at " in name:
            at, whole = (int(word) for word in name.partition(".")[0].split(" cut at ")[1].split(" of "))
            assert state == "image_unreadable" or at == whole - 1, (name, why)
    for name in ("out.png", "up/beside.png", "../beside.png", "to a device.png", "pipe.png", "socket.png", "5 GB.png"):
        assert found[name][0] == "image_refused"
