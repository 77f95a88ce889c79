"""From the bytes of a picture to the pixels a model reads: upright, RGB, and at most so many pixels.

Every engine that shows pictures to a model uses this one function, so that all of them show the same pixels.
"""

from __future__ import annotations

import io
import math

from PIL import Image, ImageOps, UnidentifiedImageError

from mllmsrec_core.errors import ImageRefused, ImageUnreadable
from tasks.engines.fetch import FORMATS


def decode(content: bytes, max_pixels: int | None = None) -> Image.Image:
    """An RGB picture turned upright by its EXIF tag, on white where it is transparent, scaled down to `max_pixels`.

    The aspect is kept and nothing is scaled up. Raises ImageUnreadable, or ImageRefused for a decompression bomb.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=FORMATS))
        return _shrink(_opaque(picture), max_pixels)
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"the picture is too large to decode safely: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageUnreadable(
            f"these {len(content)} bytes are no picture in a known format: {', '.join(FORMATS)}"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageUnreadable(f"Pillow cannot decode these {len(content)} bytes: {error}") from error


def _opaque(picture: Image.Image) -> Image.Image:
    """RGB, with white behind transparent pixels (a plain conversion would turn them black)."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(ground, layer).convert("RGB")


def _shrink(picture: Image.Image, max_pixels: int | None) -> Image.Image:
    pixels = picture.width * picture.height
    if max_pixels is None or pixels <= max_pixels:
        return picture
    scale = math.sqrt(max_pixels / pixels)
    width, height = (max(1, int(side * scale)) for side in picture.size)
    # a very long strip keeps one pixel of its short side, so the long side gives way
    width, height = min(width, max_pixels // height), min(height, max_pixels // width)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
