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
from PIL import Image

from mllmsrec_core.errors import ImageRefused, ImageUnreadable
from tasks.engines import pictures
from tasks.engines.pictures import check, decode, rgb

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


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_formats_that_are_decoded_whole_may_have_fewer_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS_WHOLE", 1_000)
    with pytest.raises(ImageRefused, match="more than 1,000 pixels"):
        check(encoded(Image.new("L", (40, 30)), kind))
    assert check(encoded(Image.new("L", (40, 30)), "JPEG")) == (40, 30)


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
