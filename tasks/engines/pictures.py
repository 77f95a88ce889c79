"""From the bytes of a picture to the pixels a model reads, and the checks that its bytes can be trusted that far.

Every engine that shows pictures to a model uses `decode`, so that all of them show the same pixels. Pixels are counted
before anything is decoded. Knows nothing of where pictures come from.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Lock

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from mllmsrec_core.errors import AskError, ImageRefused, ImageUnreadable, Passing

# What is tried at all; EPS, PSD, ICO and their like have readers with a history of holes. A JPEG 2000 takes 24 bytes of
# memory for a pixel, and no browser shows it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
Image.init()  # Image.open knows only the readers that were loaded
# Pillow's own 16 MB are few enough for glibc to keep after use; these it returns (measured: 870 MB instead of 1.2 GB).
Image.core.set_block_size(1 << 26)
MAX_PIXELS = 64_000_000  # 8,000 x 8,000
# Bytes of memory that one picture may take while it is decoded and turned into RGB, and those of one pixel (measured):
# a progressive JPEG keeps 2 for each of its colours until the last scan, other formats are decoded at full size.
MEMORY = 400_000_000
PER_COLOUR = 2.0
PER_PIXEL = {"WEBP": 16.5, "AVIF": 12.5, "TIFF": 13.0}
PER_PIXEL_ELSE = 11.0
# A progressive JPEG has about ten scans, and each costs a pass over all pixels. libtiff has the same limit.
MAX_SCANS = 100
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # of a JPEG: not a stuffed byte, a restart or a filler
SCAN, END, ALONE = 0xDA, 0xD9, 0x01  # kinds of markers; the last one has no length behind it
LARGE = 5_000_000  # pixels; larger ones are decoded one at a time, so that memory does not grow with the threads
STRIP = 1_000_000  # pixels converted at a time
_large = Lock()
# glibc keeps what threads have freed: up to 150 MB, measured over the hostile pictures. Other C libraries lack the call.
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
ORIENTATION = 0x0112  # EXIF tag
LOSSY = ("JPEG", "MPO", "AVIF")  # formats whose pixels are not exact to begin with; WebP comes in both kinds
QUALITY = 95  # of a JPEG made of one: the most that Pillow's manual advises; more grows the file and changes little
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
    with _failing(name):
        with _opened(content, max_pixels, name) as image:
            size = image.size
            image.verify()
        with _turn(size):
            return _measured(content, max_pixels, name)  # a verified image cannot be loaded any more


def decode(content: bytes, max_pixels: int | None = None) -> Image.Image:
    """The picture as a model sees it: RGB, upright, its first frame, alpha over white, at most `max_pixels` large.

    16-bit greys keep their range in 8 bits. The aspect is kept. Raises ImageUnreadable or ImageRefused.
    """
    with _failing("the picture"):
        with _opened(content, MAX_PIXELS, "the picture") as image:
            size = image.size
        with _turn(size):
            return _decoded(content, max_pixels)


def reduced(content: bytes, max_pixels: int) -> tuple[bytes, tuple[int, int]]:
    """A copy of a picture at most `max_pixels` large, as `decode` sees it, with its width and height.

    A JPEG (quality 95, colours at full resolution) of what is lossy already, else a PNG of the very pixels; no metadata.
    Equal pictures give equal copies under one version of Pillow; another one's encoder may write other bytes, so what
    was made once is to be kept. Raises ImageUnreadable or ImageRefused.
    """
    with _failing("the picture"):
        image = decode(content, max_pixels)
        image.info = {}  # places, comments and profiles would be written along
        copy = BytesIO()
        if _is_lossy(content):
            image.save(copy, "JPEG", quality=QUALITY, subsampling="4:4:4")
        else:
            image.save(copy, "PNG", compress_level=1)  # a fifth of the time for a tenth more bytes
        return copy.getvalue(), image.size


def _is_lossy(content: bytes) -> bool:
    with _opened(content, MAX_PIXELS, "the picture") as image:
        return image.format in LOSSY or (image.format == "WEBP" and b"VP8L" not in content)


def _measured(content: bytes, max_pixels: int, name: str) -> tuple[int, int]:
    with _opened(content, max_pixels, name) as image:
        width, height = image.size
        image.draft(None, (1, 1))  # JPEG: every byte is read, and an eighth of each side is drawn
        image.load()
        rgb(image.crop((0, 0, 1, 1)))  # some colour spaces have no way to RGB
        return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)


def _decoded(content: bytes, max_pixels: int | None) -> Image.Image:
    with _opened(content, MAX_PIXELS, "the picture") as opened:
        if max_pixels:
            opened.draft(None, _fitting(opened.size, max_pixels))  # JPEG: a smaller decode for less time
        opened.load()
        image = upright(rgb(opened), orientation(opened))
    size = _fitting(image.size, max_pixels) if max_pixels else image.size
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


@contextmanager
def _failing(name: str) -> Iterator[None]:
    """Whatever a decoder raises of hostile bytes, as one of our errors."""
    try:
        yield
    except AskError:
        raise
    except MemoryError as error:
        raise Passing(f"{name} did not fit into memory") from error
    except UnidentifiedImageError as error:
        raise ImageUnreadable(f"{name} is no picture of a kind that is read ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise ImageUnreadable(f"{name} cannot be decoded: {error}") from error


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
        return _grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    for top, bottom in _strips(image.size):
        seen = image.crop((0, top, image.width, bottom)).convert("RGBA")
        below = Image.new("RGBA", seen.size, "white")
        white.paste(Image.alpha_composite(below, seen).convert("RGB"), (0, top))
    return white


def _grey(image: Image.Image) -> Image.Image:
    deep = np.asarray(image)
    low, high = 0.0, 65_535.0
    if not image.mode.startswith("I;16"):
        low, high = float(np.nanmin(deep)), float(np.nanmax(deep))
    shallow = np.empty(deep.shape, np.uint8)
    for top, bottom in _strips(image.size):
        scaled = np.nan_to_num((deep[top:bottom].astype(np.float64) - low) / ((high - low) or 1.0)) * 255
        shallow[top:bottom] = scaled.round()
    return Image.fromarray(shallow).convert("RGB")


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First row and the row after the last of pieces that hold about STRIP pixels."""
    width, height = size
    rows = max(1, STRIP // width)
    return ((top, min(height, top + rows)) for top in range(0, height, rows))


@contextmanager
def _turn(size: tuple[int, int]) -> Iterator[None]:
    """A large picture has its turn alone, after the allocator gave back what smaller ones had left behind."""
    if size[0] * size[1] <= LARGE:
        yield
        return
    with _large:
        if TRIM:
            TRIM(0)
        yield


def _opened(content: bytes, max_pixels: int, name: str) -> Image.Image:
    """The picture with its header read. Raises ImageRefused when it would take too much memory or time to decode."""
    if not content:
        raise ImageUnreadable(f"{name} has zero bytes")
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"{name}: {error}") from error
    width, height = image.size
    scaled = isinstance(image, JpegImageFile)  # an MPO, too
    each = PER_COLOUR * max(3, image.layers) if scaled else PER_PIXEL.get(image.format or "", PER_PIXEL_ELSE)
    most = min(max_pixels, int(MEMORY / each))
    if width * height > most:
        raise ImageRefused(f"{name} is {width} x {height}, more than {most:,} pixels")
    if scaled and _scans(content) > MAX_SCANS:
        raise ImageRefused(f"{name} is drawn in more than {MAX_SCANS} scans")
    return image


def _scans(content: bytes) -> int:
    """How often a JPEG passes over its pixels, up to MAX_SCANS + 1; what a camera appended behind its end does not count."""
    scans, at = 0, 2
    while scans <= MAX_SCANS and (marker := MARKER.search(content, at)):
        kind, at = content[marker.start() + 1], marker.end()
        if kind == END:
            break
        scans += kind == SCAN
        if kind != ALONE:
            at += int.from_bytes(content[at : at + 2], "big")
    return scans


def _fitting(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """The largest size of the same aspect with at most `max_pixels`."""
    width, height = size
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    # a very long strip keeps one pixel of its short side, so the long side gives way
    width = min(width, max(1, max_pixels // height))
    return width, min(height, max_pixels // width)
