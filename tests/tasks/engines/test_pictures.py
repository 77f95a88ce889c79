"""Decoding pictures."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from mllmsrec_core.errors import ImageUnreadable
from tasks.engines.pictures import decode


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


@pytest.mark.parametrize("size", [(100, 50), (3, 2000), (2000, 3), (101, 99)])
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
