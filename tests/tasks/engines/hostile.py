"""Pictures somebody made to do harm, and everything else that may lie under a picture's name; made by code alone.

Run as a script with `write` it writes them below a folder; with `read` it fetches and decodes all of them in one process
and prints as JSON what became of each and how much memory that process took at most.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import resource
import socket
import struct
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (64, 48)


def encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def noise(bands: int = 3, size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def whole() -> dict[str, bytes]:
    """One sound picture of each kind, from which damaged ones are made."""
    image = noise()
    return {
        "png": encoded(image, "PNG"),
        "jpg": encoded(image, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "gif": encoded(image.quantize(64), "GIF"),
        "webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "lzw.tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "jpeg.tiff": encoded(image, "TIFF", compression="jpeg"),
        "avif": encoded(image, "AVIF"),
    }


def truncated() -> dict[str, bytes]:
    """Each kind cut off at many places: in the header, in the middle, before the last byte."""
    shares = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
    return {
        f"cut at {at} of {len(content)}.{kind}": content[:at]
        for kind, content in whole().items()
        for at in {1, 4, 12, 30, len(content) - 1, *(int(len(content) * share) for share in shares)}
    }


def damaged() -> dict[str, bytes]:
    """Each kind with some bytes changed, those at its head among them."""
    draw, made = random.Random(0), {}
    for kind, content in whole().items():
        for n in range(12):
            changed = bytearray(content)
            end = 60 if n % 2 else len(content)
            for _ in range(1 + n):
                changed[draw.randrange(8, end)] = draw.choice((0, 0x7F, 0x80, 0xFF))
            made[f"damaged {n}.{kind}"] = bytes(changed)
    return made


def chunks(*of: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks."""
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in of)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def header(width: int, height: int, colours: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)


def zeros(n: int) -> bytes:
    """`n` zero bytes, packed a thousandfold without ever standing in memory."""
    packer, piece = zlib.compressobj(9), bytes(1 << 20)
    return (
        b"".join(packer.compress(piece[: min(len(piece), n - at)]) for at in range(0, n, len(piece))) + packer.flush()
    )


def claims() -> dict[str, bytes]:
    """A few bytes that claim to be an enormous picture, or one of no size."""
    made = {}
    for width, height in (
        (60_000, 60_000),
        (2**31 - 1, 1),
        (1, 2**31 - 1),
        (30_000, 30_000),
        (0, 5),
        (2**31 - 1, 2**31 - 1),
    ):
        end = f"{width} x {height}"
        made[f"claims {end}.png"] = chunks(header(width, height, 2), (b"IDAT", zeros(100)), (b"IEND", b""))
        made[f"claims {end}.bmp"] = b"BM" + struct.pack(
            "<IHHIIiiHHIIIIII", 100, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6
        )
        tiff = bytearray(whole()["tiff"])
        ifd = struct.unpack_from("<I", tiff, 4)[0]
        for entry in range(struct.unpack_from("<H", tiff, ifd)[0]):
            at = ifd + 2 + 12 * entry
            if (tag := struct.unpack_from("<H", tiff, at)[0]) in (256, 257):
                struct.pack_into("<HII", tiff, at + 2, 4, 1, width if tag == 256 else height)
        made[f"claims {end}.tiff"] = bytes(tiff)
    for kind in ("jpg", "progressive.jpg"):
        jpeg = bytearray(whole()[kind])
        at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
        struct.pack_into(">HH", jpeg, at + 5, 65_500, 65_500)
        made[f"claims 65500 x 65500.{kind}"] = bytes(jpeg)
        struct.pack_into(">HH", jpeg, at + 5, 8_000, 8_000)
        made[f"claims 8000 x 8000.{kind}"] = bytes(jpeg)
    gif = bytearray(whole()["gif"])
    struct.pack_into("<HH", gif, 6, 65_535, 65_535)
    made["claims 65535 x 65535.gif"] = bytes(gif)
    canvas = (16_382).to_bytes(3, "little") * 2
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    made["claims 16383 x 16383.webp"] = b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended
    return made


def bombs() -> dict[str, bytes]:
    """Small files that unpack to a lot: pixels, metadata, frames, scans. Some are within every limit."""
    many = [Image.new("P", (16, 16), n % 256) for n in range(3_000)]
    text = b"Comment\0\0" + zeros(200_000_000)
    small = (header(1, 1), (b"IDAT", zlib.compress(bytes(2))), (b"IEND", b""))
    jpeg = encoded(noise(1, (512, 512)), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    segment = b"\xff\xe1" + struct.pack(">H", 65_535) + bytes(65_533)
    large = encoded(Image.new("CMYK", (7_000, 7_000)), "JPEG", progressive=True)
    scans = large[large.rindex(b"\xff\xda") : -2] * 80
    return {
        "400 million pixels.png": chunks(header(20_000, 20_000), (b"IDAT", zeros(20_001 * 20_000)), (b"IEND", b"")),
        "as many pixels as allowed.png": encoded(Image.new("RGBA", (6_000, 6_000)), "PNG"),
        "as many pixels as allowed.webp": encoded(Image.new("RGBA", (4_900, 4_900)), "WEBP", method=0),
        "as many pixels as allowed.avif": encoded(Image.new("RGBA", (5_600, 5_600)), "AVIF", speed=10),
        "as many deep pixels as allowed.tiff": encoded(Image.new("F", (5_500, 5_500)), "TIFF", compression="tiff_lzw"),
        "as many pixels as allowed.jpg": large,
        "as many pixels and scans as allowed.jpg": large[:-2] + scans + large[-2:],
        "as many pixels as allowed.gif": encoded(Image.new("P", (6_000, 6_000)), "GIF"),
        "packed text.png": chunks(small[0], (b"zTXt", text), *small[1:]),
        "packed text behind the pixels.png": chunks(*small[:2], *[(b"zTXt", text)] * 4, small[2]),
        "packed colour profile.png": chunks(small[0], (b"iCCP", text), *small[1:]),
        "more pixels packed than claimed.png": chunks(header(10, 10), (b"IDAT", zeros(300_000_000)), (b"IEND", b"")),
        "much text.png": chunks(small[0], *[(b"tEXt", b"a\0" + b"x" * 500_000)] * 30, *small[1:]),
        "much metadata.jpg": jpeg[:2] + segment * 250 + jpeg[2:],
        "many scans.jpg": jpeg[:-2] + scan * 200 + jpeg[-2:],
        "3,000 frames.gif": encoded(many[0], "GIF", save_all=True, append_images=many[1:]),
        "1,000 frames.png": encoded(many[0], "PNG", save_all=True, append_images=many[1:1_000]),
        "500 frames.webp": encoded(many[0].convert("RGB"), "WEBP", save_all=True, append_images=many[1:500], method=0),
        "200 pages.tiff": encoded(noise(), "TIFF", save_all=True, append_images=[noise()] * 199),
        "a page that is its own next.tiff": own_next(whole()["tiff"]),
        "one pixel wide.png": encoded(Image.new("L", (1, 1_000_000)), "PNG"),
        "one pixel high.png": encoded(Image.new("LA", (1_000_000, 1)), "PNG"),
        "nothing but zeros.png": bytes(19_000_000),
        "too many bytes.jpg": jpeg + bytes(21_000_000),
    }


def own_next(tiff: bytes) -> bytes:
    changed = bytearray(tiff)
    ifd = struct.unpack_from("<I", tiff, 4)[0]
    struct.pack_into("<I", changed, ifd + 2 + 12 * struct.unpack_from("<H", tiff, ifd)[0], ifd)
    return bytes(changed)


def no_pictures() -> dict[str, bytes]:
    """What else is found under a picture's name."""
    made = {
        "empty": b"",
        "a line end": b"\n",
        "NULs": bytes(5_000),
        "text": b"no picture\n" * 99,
        "utf-16": "no picture".encode("utf-16"),
        "page": b"<!doctype html><html><body>404</body></html>",
        "drawing": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n",
        "document": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>",
        "program": b"\x7fELF\x02\x01\x01" + bytes(100),
        "script": b"#!/bin/sh\nrm -rf /\n",
        "pickle": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
        "film": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(100),
        "gzip": zlib.compress(bytes(1_000), wbits=31),
        "photoshop": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 10, 10, 8, 3) + bytes(100),
        "portable": b"P6 99999 99999 255\n" + bytes(100),
    }
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.jpg", whole()["jpg"])
        made["archive"] = buffer.getvalue()
    for kind in ("ICO", "TGA", "PCX", "JPEG2000", "PPM", "PDF", "SGI", "IM"):
        made[kind] = encoded(noise(size=(32, 32)), kind)
    return {f"{name}.jpg": content for name, content in made.items()}


def odd() -> dict[str, bytes]:
    """Sound pictures as few cameras write them."""
    ramp = np.linspace(0, 65_535, 48 * 64).reshape(48, 64)
    deep = {"I;16": ramp.astype(np.uint16), "I": ramp.astype(np.int32) - 9_999, "F": ramp.astype(np.float32)}
    wild = deep["F"].copy()
    wild[0, :4] = np.nan, np.inf, -np.inf, 3e38
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "RGBX")
    made = {f"{mode}.tiff": encoded(Image.new(mode, SIZE), "TIFF") for mode in modes}
    made |= {f"{mode}.png": encoded(Image.new(mode, SIZE), "PNG") for mode in ("1", "L", "LA", "P", "RGBA")}
    made |= {f"{mode}.jpg": encoded(Image.new(mode, SIZE), "JPEG") for mode in ("L", "CMYK")}
    made |= {
        f"deep {mode.replace(';', '')}.tiff": encoded(Image.fromarray(grey), "TIFF") for mode, grey in deep.items()
    }
    made["not a number.tiff"] = encoded(Image.fromarray(wild), "TIFF")
    made["only not a number.tiff"] = encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    made["deep.png"] = encoded(Image.fromarray(deep["I;16"]), "PNG")
    for turn in (0, 3, 6, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = turn
        made[f"turned {turn}.jpg"] = encoded(noise(), "JPEG", exif=exif)
    made["broken exif.jpg"] = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 60)
    return made


NAMES = (
    "line\nend.png",
    "bell\a and escape\x1b[31m.png",
    "\u202egnp.exe.png",
    "percent %00 %2e%2e.png",
    "# ? & = ;.png",
    "-rf.png",
    "~.png",
    "back\\slash.png",
    "'; drop table items; --.png",
    "\N{HAMBURGER}.png",
    "no\udcff utf-8.png",
    "l" * 251 + ".png",
)


def archives(folder: Path) -> list[str]:
    """Archives below `folder`, and the URIs of what is in them."""
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(folder / "covers.zip", "w") as archive:
        archive.writestr("fine.png", whole()["png"])
        archive.writestr("deep/fine.jpg", whole()["jpg"], zipfile.ZIP_DEFLATED)
        archive.writestr("../../up.png", whole()["png"])
        archive.writestr("bomb.png", bytes(500_000_000), zipfile.ZIP_DEFLATED)
        archive.writestr("lzma.png", whole()["png"], zipfile.ZIP_LZMA)
        archive.writestr("twice.png", b"no picture")
        archive.writestr("twice.png", whole()["png"])
        archive.writestr("lies.png", bytes(50_000_000), zipfile.ZIP_DEFLATED)
        archive.writestr("folder/", b"")
        for info in archive.infolist():
            if info.filename == "lies.png":
                info.file_size = 1_000
    content = (folder / "covers.zip").read_bytes()
    (folder / "cut.zip").write_bytes(content[: len(content) // 2])
    (folder / "empty.zip").write_bytes(b"")
    changed = bytearray(content)
    at = content.index(whole()["png"]) + 100
    changed[at] ^= 0xFF
    (folder / "damaged.zip").write_bytes(changed)
    members = (
        "fine.png",
        "deep/fine.jpg",
        "../../up.png",
        "bomb.png",
        "lzma.png",
        "twice.png",
        "lies.png",
        "folder/",
        "gone",
    )
    uris = [f"zip://{member}::{folder}/covers.zip" for member in members]
    uris += [f"zip://fine.png::{folder}/{name}.zip" for name in ("cut", "empty", "damaged", "gone")]
    return [
        *uris,
        f"zip://a::zip://b::{folder}/covers.zip",
        "zip://etc/passwd::/etc/x.zip",
        f"zip://a::{folder}",
        "zip://a",
    ]


def write(folder: Path) -> list[str]:
    """Everything below `folder`; the URIs by which a dataset would name it."""
    made = {**whole(), **truncated(), **damaged(), **claims(), **bombs(), **no_pictures(), **odd()}
    for number, (name, content) in enumerate(made.items()):
        (folder / f"{number} {name}").write_bytes(content)
    names = [f"{number} {name}" for number, name in enumerate(made)]
    for name in NAMES:
        (folder / name).write_bytes(whole()["png"])
    beside = folder.parent / "beside.png"
    beside.write_bytes(whole()["png"])
    (folder / "out.png").symlink_to(beside)
    (folder / "to a device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    (folder / "up").symlink_to(folder.parent)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket.png"))  # a path of at most 107 bytes
    with (folder / "5 GB.png").open("wb") as sparse:
        sparse.truncate(5_000_000_000)
    special = ("out", "to a device", "loop", "dangling", "up/beside", "folder", "pipe", "socket", "5 GB", "../beside")
    names += [*NAMES, *(f"{name}.png" for name in special), "nul\0.png", ""]
    return [f"{folder}/{name}" for name in names] + archives(folder)


def peak() -> int:
    """Bytes of memory this process has held at most; what it was started by does not count."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1_024)
    [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1_024


def main(folder: Path, stage: str) -> None:
    uris_file = folder / "uris.json"
    pictures = folder / "pictures"
    if stage == "write":
        pictures.mkdir()
        uris_file.write_text(json.dumps(write(pictures)))
        return
    from mllmsrec_core.ask import Fetch
    from mllmsrec_core.errors import AskError
    from storage.blobs import Blobs
    from storage.files import Files
    from tasks.engines.fetch import FetchEngine
    from tasks.engines.pictures import decode

    async def all_of(uris: list[str]) -> list[tuple[str, str, str]]:
        blobs = Blobs(Files(str(folder / "store")))
        engine = FetchEngine(blobs, allow_roots=[str(pictures)], timeout=120.0)

        async def one(uri: str) -> tuple[str, str, str]:
            try:
                value = (await engine.answer(Fetch(uri, "1", 1_000_000))).value
                image = decode(blobs.get(value["sha256"]), 500_000)
                assert image.mode == "RGB" and image.width * image.height <= 500_000
                return uri, "ok", f"{value['width']} x {value['height']}"
            except AskError as error:
                return uri, error.error_class, str(error)

        try:
            return await asyncio.gather(*map(one, uris))
        finally:
            await engine.close()

    found = asyncio.run(all_of(json.loads(uris_file.read_text())))
    sys.stdout.write(json.dumps({"found": found, "peak": peak()}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[3]))
    main(Path(sys.argv[1]), sys.argv[2])
