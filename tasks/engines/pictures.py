"""From the bytes of a picture to the pixels a model reads, and the checks that its bytes can be trusted that far.

Every engine that shows pictures to a model uses `decode`, so that all of them show the same pixels. Pixels are counted
before anything is decoded. Knows nothing of where pictures come from.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from mllmsrec_core.errors import AskError, ImageRefused, ImageUnreadable, Passing

# What is tried at all; EPS, PSD, ICO and their like have readers with a history of holes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
Image.init()  # Image.open knows only the readers that were loaded
MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check(content: bytes, max_pixels: int = MAX_PIXELS, name: str = "the picture") -> tuple[int, int]:
    """Width and height as seen, after the first frame was decoded. Raises ImageUnreadable or ImageRefused."""
    try:
        with _opened(content, max_pixels, name) as image:
            image.verify()
        with _opened(content, max_pixels, name) as image:  # a verified image cannot be loaded any more
            image.load()
            width, height = image.size
            turned = orientation(image) in (5, 6, 7, 8)
            rgb(image.crop((0, 0, 1, 1)))  # some colour spaces have no way to RGB
    except AskError:
        raise
    except MemoryError as error:
        raise Passing(f"{name} did not fit into memory") from error
    except Exception as error:  # decoders of hostile bytes raise anything
        raise ImageUnreadable(f"{name} cannot be decoded: {error}") from error
    return (height, width) if turned else (width, height)


def decode(content: bytes, max_pixels: int | None = None) -> Image.Image:
    """The picture as a model sees it: RGB, upright, its first frame, alpha over white, at most `max_pixels` large.

    16-bit greys keep their range in 8 bits. The aspect is kept. Raises ImageUnreadable or ImageRefused.
    """
    try:
        with _opened(content, MAX_PIXELS, "the picture") as opened:
            if max_pixels:
                opened.draft(None, _fitting(opened.size, max_pixels))  # JPEG: a smaller decode for less time
            opened.load()
            image = upright(rgb(opened), orientation(opened))
    except AskError:
        raise
    except Exception as error:  # decoders of hostile bytes raise anything
        raise ImageUnreadable(f"the picture cannot be decoded: {error}") from error
    size = _fitting(image.size, max_pixels) if max_pixels else image.size
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded picture; 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken metadata does not make a picture unreadable
        return 1


def upright(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image


def rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: deep greys scaled to 8 bits, transparency over white."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16"):
            low, high = 0.0, 65_535.0
        else:
            low, high = float(np.nanmin(grey)), float(np.nanmax(grey))
        scaled = np.nan_to_num((grey - low) / ((high - low) or 1.0)) * 255
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    white = Image.new("RGBA", seen.size, "white")
    return Image.alpha_composite(white, seen).convert("RGB")


def _opened(content: bytes, max_pixels: int, name: str) -> Image.Image:
    """The picture with its header read. Raises ImageRefused when it claims more than `max_pixels`."""
    if not content:
        raise ImageUnreadable(f"{name} has zero bytes")
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"{name}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageRefused(f"{name} is {width} x {height}, more than {max_pixels:,} pixels")
    return image


def _fitting(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """The largest size of the same aspect with at most `max_pixels`."""
    width, height = size
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    # a very long strip keeps one pixel of its short side, so the long side gives way
    return min(width, max_pixels // height), min(height, max_pixels // width)
