"""Fetching trusts neither where a picture lies nor what its bytes say, and outlasts trouble that passes."""

import asyncio
import gzip
import os
import random
import struct
import threading
import time
import uuid
import zipfile
import zlib
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from PIL import Image

from mllmsrec_core.ask import Fetch
from mllmsrec_core.errors import ImageMissing, ImageRefused, ImageUnreadable, Passing, StoreError
from storage.blobs import Blobs
from storage.files import Files
from tasks.engines import fetch as engine_module
from tasks.engines.fetch import FetchEngine, is_public
from tasks.engines.pictures import FORMATS, check, decode


def encoded(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode="RGB", size=(40, 30)):
    rng = np.random.default_rng(0)
    bands = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return (
        Image.fromarray(pixels.squeeze(), mode=mode)
        if mode != "CMYK"
        else Image.merge("CMYK", [Image.fromarray(pixels[:, :, band]) for band in range(4)])
    )


def claiming(width, height):
    """A small PNG whose header claims `width` x `height`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


JPEG = encoded(noise(), "JPEG")
PNG = encoded(noise())


def fetch(*uris, limit=None, **options):
    """Answers of one engine over a store in memory, in order; an error stands for its answer. `limit`: asked for pixels."""

    async def go():
        blobs = Blobs(Files(f"memory://store-{uuid.uuid4().hex}"))
        engine = FetchEngine(blobs, **{"wait": 0.01, **options})
        try:
            replies = await asyncio.gather(
                *(engine.answer(Fetch(uri, "1", limit)) for uri in uris), return_exceptions=True
            )
        finally:
            await engine.close()
        return blobs, replies

    return asyncio.run(go())


def only(uri, **options):
    _, [reply] = fetch(uri, **options)
    if isinstance(reply, BaseException):
        raise reply
    return reply


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_below_an_allowed_root_is_kept_as_it_is(tmp_path, scheme):
    (tmp_path / "a b#1%20.jpg").write_bytes(JPEG)
    blobs, [reply] = fetch(f"{scheme}{tmp_path}/a b#1%20.jpg", allow_roots=[str(tmp_path)])
    assert reply.value == {"sha256": sha256(JPEG).hexdigest(), "width": 40, "height": 30}
    assert blobs.get(reply.value["sha256"]) == JPEG
    assert reply.engine == "fetch"


def test_a_file_outside_the_roots_is_refused_however_it_is_reached(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (root / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (root / "up").symlink_to(tmp_path)
    for path in (tmp_path / "a.jpg", f"{root}/../a.jpg", root / "link.jpg", root / "up" / "a.jpg", "/etc/passwd", ""):
        with pytest.raises(ImageRefused, match="outside the allowed roots"):
            only(str(path), allow_roots=[str(root)])


def test_a_refused_place_is_named_with_the_setting_that_admits_it_and_the_command_that_asks_again(tmp_path, site):
    again = "then `mllmsrec retry --stage images --class image_refused`"
    with pytest.raises(ImageRefused) as outside:
        only("/elsewhere/a.jpg", allow_roots=[str(tmp_path)])
    assert str(outside.value) == (
        f"/elsewhere/a.jpg lies outside the allowed roots ({tmp_path}); admit its folder by settings.image_roots, {again}"
    )
    with pytest.raises(ImageRefused) as private:
        only(f"{site}/a.jpg")
    assert str(private.value) == (
        f"127.0.0.1 has an address that is not public (127.0.0.1); allow it by settings.allow_hosts, {again}"
    )


def test_without_roots_no_file_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    with pytest.raises(ImageRefused):
        only(str(tmp_path / "a.jpg"))


@pytest.mark.parametrize(
    "uri",
    [
        "simplecache::file://{}/a.jpg",
        "zip://a.jpg::zip://b.zip::file://{}/a.zip",
        "zip://a.jpg::/etc/a.zip",
        "zip://a.jpg::http://x/a.zip",
        "zip://a.jpg",
        "tar://a.jpg::{}/a.tar",
        "ftp://x/a",
        "data:,x",
    ],
)
def test_chained_and_unknown_schemes_are_refused(tmp_path, uri):
    with pytest.raises(ImageRefused):
        only(uri.format(tmp_path), allow_roots=[str(tmp_path)])


@pytest.mark.parametrize("name", ["nothing.jpg", "a.jpg/b.jpg", "folder", "n" * 300 + ".jpg", "nul\0.jpg"])
def test_where_nothing_lies_the_picture_is_missing(tmp_path, name):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageMissing):
        only(f"{tmp_path}/{name}", allow_roots=[str(tmp_path)])


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageRefused, match="not a file"):
        only(f"{tmp_path}/pipe.jpg", allow_roots=[str(tmp_path)])


def test_a_file_with_too_many_bytes_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    with pytest.raises(ImageRefused, match=r"more than 100 bytes"):
        only(f"{tmp_path}/a.jpg", allow_roots=[str(tmp_path)], max_bytes=100)


def test_any_file_system_below_an_allowed_url_is_read():
    root = f"memory://{uuid.uuid4().hex}"
    with fsspec.open(f"{root}/a.png", "wb") as file:
        file.write(PNG)
    assert only(f"{root}/a.png", allow_roots=[root]).value["width"] == 40
    with pytest.raises(ImageMissing):
        only(f"{root}/b.png", allow_roots=[root])
    with pytest.raises(ImageRefused):
        only(f"{root}/a.png", allow_roots=[root, ""], max_bytes=10)
    with pytest.raises(ImageRefused):
        only(f"{root}/a.png", allow_roots=[f"{root}/deeper"])


def test_the_demo_shop_draws_its_pictures():
    uri = "demo://mug/red/striped/7-I0012.png"
    assert only(uri).value["sha256"] == only(uri).value["sha256"]
    with pytest.raises(ImageMissing):
        only("demo://nothing")


def test_many_pictures_are_fetched_at_once_and_a_bad_one_fails_alone(tmp_path):
    for n in range(200):
        (tmp_path / f"{n}.png").write_bytes(PNG if n != 7 else b"")
    _, replies = fetch(*(f"{tmp_path}/{n}.png" for n in range(200)), allow_roots=[str(tmp_path)])
    assert [n for n, reply in enumerate(replies) if isinstance(reply, ImageUnreadable)] == [7]
    assert len({reply.value["sha256"] for n, reply in enumerate(replies) if n != 7}) == 1


@pytest.mark.parametrize("chain", ["zip://covers/a.jpg::{}", "zip:///covers/a.jpg::file://{}"])
def test_a_member_of_an_archive_below_a_root_is_fetched_as_fsspec_names_it(tmp_path, chain):
    with zipfile.ZipFile(tmp_path / "covers.zip", "w") as archive:
        archive.writestr("covers/a.jpg", JPEG)
    uri = chain.format(tmp_path / "covers.zip")
    assert fsspec.open(uri).open().read() == JPEG
    assert only(uri, allow_roots=[str(tmp_path)]).value["sha256"] == sha256(JPEG).hexdigest()
    with pytest.raises(ImageRefused, match="outside the allowed roots"):
        only(uri, allow_roots=[str(tmp_path / "deeper")])


def test_by_reference_only_the_place_is_kept_and_the_bytes_are_proved_at_every_reading(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    with zipfile.ZipFile(tmp_path / "covers.zip", "w") as archive:
        archive.writestr("b.png", PNG)
    uris = (f"{tmp_path}/a.jpg", f"zip://b.png::{tmp_path}/covers.zip")
    blobs, replies = fetch(*uris, allow_roots=[str(tmp_path)], keep="reference")
    assert [blobs.get(reply.value["sha256"]) for reply in replies] == [JPEG, PNG]
    assert sum(blobs.files.size(name) for name in blobs.files.names("blobs")) < 1_000
    (tmp_path / "a.jpg").write_bytes(JPEG[:-1] + b"\0")
    with pytest.raises(StoreError, match=r"a\.jpg, which has changed.*run --stage images"):
        blobs.get(replies[0].value["sha256"])


def test_what_is_drawn_or_comes_from_the_web_is_copied_in_any_case(site):
    uris = ("demo://mug/red/striped/7-I0012.png", f"{site}/a.jpg")
    blobs, replies = fetch(*uris, keep="reference", **LOCAL)
    assert not [name for name in blobs.files.names("blobs") if name.endswith(".ref")]
    assert blobs.get(replies[1].value["sha256"]) == JPEG


# --- bytes -----------------------------------------------------------------------------------------------------

ANIMATED = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
ODD = {
    "cmyk jpeg": encoded(noise("CMYK"), "JPEG"),
    "grey jpeg": encoded(noise("L"), "JPEG"),
    "progressive jpeg": encoded(noise(), "JPEG", progressive=True),
    "palette png": encoded(noise().quantize(16)),
    "alpha png": encoded(noise("RGBA")),
    "palette gif with transparency": encoded(noise().quantize(16), "GIF", transparency=3),
    "16-bit png": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
    "16-bit tiff": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "TIFF"),
    "float tiff": encoded(Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)), "TIFF"),
    "1-bit png": encoded(noise("L").convert("1")),
    "animated gif": encoded(ANIMATED[0], "GIF", save_all=True, append_images=ANIMATED[1:]),
    "animated webp": encoded(ANIMATED[0], "WEBP", save_all=True, append_images=ANIMATED[1:], lossless=True),
    "animated png": encoded(ANIMATED[0], "PNG", save_all=True, append_images=ANIMATED[1:]),
    "bmp": encoded(noise(), "BMP"),
    "avif": encoded(noise(), "AVIF"),
    "one pixel": encoded(Image.new("RGB", (1, 1))),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_every_kind_of_picture_is_fine_and_decodes_to_rgb_of_the_same_size(content):
    image = decode(content)
    assert image.mode == "RGB"
    assert check(content) == image.size


@pytest.mark.parametrize("keep", ["copy", "reference"])
def test_a_picture_that_is_larger_than_asked_for_is_kept_as_one_smaller_copy(tmp_path, keep):
    large = encoded(noise(size=(400, 300)), "JPEG")
    for name in ("a.jpg", "again.jpg"):
        (tmp_path / name).write_bytes(large)
    uris = [f"{tmp_path}/{name}" for name in ("a.jpg", "again.jpg")]
    blobs, [reply, again] = fetch(*uris, limit=5_000, allow_roots=[str(tmp_path)], keep=keep)
    assert again.value == reply.value, "equal pictures share a caption"
    about = reply.value
    assert about["original_sha256"] == sha256(large).hexdigest() != about["sha256"]
    assert blobs.files.names("blobs") == [f"blobs/{about['sha256'][:2]}/{about['sha256']}"]
    kept = blobs.get(about["sha256"])
    assert check(kept) == (about["width"], about["height"]) == decode(large, 5_000).size
    assert len(kept) < len(large) / 5


@pytest.mark.parametrize("keep", ["copy", "reference"])
@pytest.mark.parametrize("name", ["jpeg", "png", *ODD])
def test_a_picture_that_is_no_larger_than_asked_for_is_kept_byte_for_byte(tmp_path, name, keep):
    content = {"jpeg": JPEG, "png": PNG, **ODD}[name]
    width, height = check(content)
    (tmp_path / "a").write_bytes(content)
    blobs, [reply] = fetch(f"{tmp_path}/a", limit=width * height, allow_roots=[str(tmp_path)], keep=keep)
    named = sha256(content).hexdigest()
    assert reply.value == {"sha256": named, "original_sha256": named, "width": width, "height": height}
    assert blobs.get(named) == content
    assert blobs.files.names("blobs") == [f"blobs/{named[:2]}/{named}{'.ref' if keep == 'reference' else ''}"]


@pytest.mark.parametrize("name", ["jpeg", "png", *(name for name in ODD if name != "one pixel")])
def test_one_pixel_too_many_makes_a_copy_of_any_kind_of_picture(tmp_path, name):
    content = {"jpeg": JPEG, "png": PNG, **ODD}[name]
    width, height = check(content)
    (tmp_path / "a").write_bytes(content)
    blobs, [reply] = fetch(f"{tmp_path}/a", limit=width * height - 1, allow_roots=[str(tmp_path)], keep="reference")
    assert reply.value["original_sha256"] == sha256(content).hexdigest() != reply.value["sha256"]
    assert 0 < reply.value["width"] * reply.value["height"] < width * height
    assert decode(blobs.get(reply.value["sha256"])).size == (reply.value["width"], reply.value["height"])


BAD = {
    "zero bytes": b"",
    "text": b"this is no picture\n" * 50,
    "html": b"<html><body>404</body></html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "icon": encoded(noise(size=(32, 32)), "ICO"),
    "half a jpeg": JPEG[: len(JPEG) // 2],
    "half a png": PNG[: len(PNG) // 2],
    "a jpeg header": JPEG[:20],
    "png that claims more than it holds": claiming(500, 500),
    "png with a flipped byte": PNG[:200] + bytes([PNG[200] ^ 0xFF]) + PNG[201:],
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bytes_that_are_no_whole_picture_are_unreadable(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageUnreadable):
        only(f"{tmp_path}/a.jpg", allow_roots=[str(tmp_path)])
    with pytest.raises(ImageUnreadable):
        decode(content)


def test_what_passes_the_check_can_be_decoded_whatever_its_colour_space():
    for mode in ("LAB", "YCbCr", "I", "F", "LA", "CMYK", "1", "P"):
        content = encoded(Image.new(mode, (4, 4)), "TIFF")
        try:
            check(content)
        except ImageUnreadable:
            continue
        assert decode(content).mode == "RGB"


@pytest.mark.parametrize("size", [(20_000, 20_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_before_it_is_decoded(size):
    begin = time.perf_counter()
    with pytest.raises(ImageRefused):
        check(claiming(*size))
    with pytest.raises(ImageRefused):
        decode(claiming(*size))
    assert time.perf_counter() - begin < 1


def test_the_pixel_limit_can_be_set():
    assert check(PNG, max_pixels=1_200) == (40, 30)
    with pytest.raises(ImageRefused, match="40 x 30, more than 1,199 pixels"):
        check(PNG, max_pixels=1_199)


def test_random_damage_never_does_more_than_fail_its_row():
    rng = random.Random(0)
    sources = [JPEG, PNG, *ODD.values()]
    for _ in range(400):
        content = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 12)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            width, height = check(bytes(content), max_pixels=1_000_000)
        except (ImageUnreadable, ImageRefused):
            continue
        assert width > 0 and height > 0


# --- decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_picture_stands_upright(turn, format):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(Image.new("RGB", (40, 30), "red"), format, exif=exif)
    upright = (30, 40) if turn >= 5 else (40, 30)
    assert check(content) == decode(content).size == upright


def test_the_turn_is_the_right_one():
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned clockwise
    assert decode(encoded(image, exif=exif)).getpixel((0, 0)) == (255, 255, 255)
    exif[0x0112] = 8
    assert decode(encoded(image, exif=exif)).getpixel((0, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_cut():
    grey = Image.fromarray(np.array([[0, 32_896, 65_535]], dtype=np.uint16))
    assert [decode(encoded(grey)).getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 128, 255)]


def test_what_is_transparent_is_white():
    assert decode(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(Image.new("LA", (2, 2), (0, 128)))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("name", ["animated gif", "animated webp", "animated png"])
def test_of_an_animation_the_first_frame_is_taken(name):
    red, _, blue = decode(ODD[name]).getpixel((0, 0))
    assert red > 200 and blue < 50


def test_cmyk_keeps_its_colours():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    r, g, b = decode(encoded(red, "JPEG", quality=95)).getpixel((4, 4))
    assert r > 240 and g < 20 and b < 20


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("max_pixels", [1, 100, 5_000, 120_000, 10**9])
def test_a_picture_is_made_smaller_only_when_it_must_be_and_keeps_its_aspect(format, max_pixels):
    content = encoded(noise(size=(400, 300)), format)
    image = decode(content, max_pixels)
    assert image.width * image.height <= max(max_pixels, 1)
    if max_pixels >= 120_000:
        assert image.size == (400, 300)
    elif max_pixels >= 100:
        assert abs(image.width / image.height - 4 / 3) < 0.2
        assert image.width * image.height > 0.8 * max_pixels


def test_decoding_is_a_function_of_the_bytes():
    content = encoded(noise(size=(400, 300)), "JPEG")
    assert decode(content, 5_000).tobytes() == decode(content, 5_000).tobytes()


def test_every_allowed_format_is_known_to_pillow():
    Image.init()
    assert {name for name in FORMATS if name != "MPO"} <= set(Image.OPEN)


# --- the web ---------------------------------------------------------------------------------------------------


PACKED = {
    "gzip": gzip.compress(JPEG),
    "deflate": zlib.compress(JPEG),
    "bomb": gzip.compress(bytes(200_000_000), 1),
    "damaged": gzip.compress(JPEG)[:-50] + bytes(50),
}


class Site(BaseHTTPRequestHandler):
    hosts: ClassVar[list[str]] = []
    asked: ClassVar[Counter] = Counter()

    def do_GET(self):
        Site.hosts.append(self.headers["Host"])
        path = self.path.strip("/")
        Site.asked[path] += 1
        if path.startswith("flaky/"):  # flaky/<status>/<how often>/<a name of its own>
            status, times = (int(word) for word in path.split("/")[1:3])
            return self.reply(status) if Site.asked[path] <= times else self.reply(200, JPEG)
        if path.startswith("packed/"):
            name = path[7:]
            encoding = name if name in ("gzip", "deflate", "br") else "gzip"
            return self.reply(200, PACKED.get(name, JPEG), headers={"Content-Encoding": encoding})
        if path.startswith("circle/"):
            return self.reply(302, location="/circle/b" if path == "circle/a" else "/circle/a")
        if path.isdigit():
            return self.reply(int(path))
        if path.startswith("to/"):
            return self.reply(302, location=path[3:])
        if path.startswith("hops/"):
            left = int(path[5:])
            return self.reply(302, location=f"/hops/{left - 1}") if left else self.reply(200, JPEG)
        match path:
            case "a.jpg":
                self.reply(200, JPEG)
            case "page.jpg":
                self.reply(200, BAD["html"])
            case "short":  # promises more than it sends
                self.reply(200, JPEG, length=len(JPEG) + 100)
            case "cut":  # promises less than it sends
                self.reply(200, JPEG, length=len(JPEG) // 2)
            case "stall":
                self.reply(200, b"", length=len(JPEG))
                self.wfile.flush()
                time.sleep(1.5)
            case "busy":
                self.reply(429, headers={"Retry-After": "3600"})
            case "endless":
                self.reply(200, b"", length=None)
                for _ in range(1_000):
                    self.wfile.write(b"x" * 10_000)
            case "slow":
                time.sleep(1.5)
                self.reply(200, JPEG)
            case "drip":
                self.reply(200, b"", length=len(JPEG))
                for byte in JPEG:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)

    def reply(self, status, body=b"", location=None, length=-1, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if location:
            self.send_header("Location", location)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # readers that hang up are what is tested
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


LOCAL = {"allow_hosts": ["127.0.0.1"]}


def test_a_picture_on_an_allowed_host_is_fetched_under_its_own_name(site):
    assert only(f"{site}/a.jpg", **LOCAL).value["sha256"] == sha256(JPEG).hexdigest()
    by_name = site.replace("127.0.0.1", "localhost")
    assert only(f"{by_name}/a.jpg", allow_hosts=[by_name.removeprefix("http://")]).value["width"] == 40
    assert Site.hosts[-1] == by_name.removeprefix("http://")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_a_host_whose_address_is_not_public_is_refused(site, host):
    asked = len(Site.hosts)
    with pytest.raises(ImageRefused, match="not public"):
        only(f"{site.replace('127.0.0.1', host)}/a.jpg")
    assert len(Site.hosts) == asked


def test_a_redirect_is_checked_like_the_first_address(site):
    for target, why in (
        (f"{site.replace('127.0.0.1', 'localhost')}/a.jpg", r"localhost has an address that is not public"),
        ("http://169.254.169.254/latest", r"169\.254\.169\.254 has an address that is not public"),
        ("http://10.0.0.1/a.jpg", r"10\.0\.0\.1 has an address that is not public"),
        ("file:///etc/passwd", "not at a web address"),
    ):
        with pytest.raises(ImageRefused, match=why):
            only(f"{site}/to/{target}", **LOCAL)


def test_five_redirects_are_followed_and_a_sixth_is_refused(site):
    assert only(f"{site}/hops/5", **LOCAL).value["width"] == 40
    with pytest.raises(ImageRefused, match="more than 5 times"):
        only(f"{site}/hops/6", **LOCAL)


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, ImageMissing), (410, ImageMissing), (403, ImageMissing), (429, Passing), (500, Passing), (503, Passing)],
)
def test_a_status_is_lasting_or_passing_trouble(site, status, error):
    with pytest.raises(error, match=str(status)):
        only(f"{site}/{status}", **LOCAL)


def test_a_page_named_jpg_is_unreadable(site):
    with pytest.raises(ImageUnreadable):
        only(f"{site}/page.jpg", **LOCAL)


def test_a_body_is_cut_off_at_the_byte_limit_whatever_its_header_says(site):
    with pytest.raises(ImageRefused, match="more than 50,000 bytes"):
        only(f"{site}/endless", max_bytes=50_000, **LOCAL)


@pytest.mark.parametrize("path", ["slow", "drip", "stall"])
def test_a_host_that_is_too_slow_is_passing_trouble(site, path):
    begin = time.perf_counter()
    with pytest.raises(Passing, match=r"took more than 0\.5 s|ReadTimeout"):
        only(f"{site}/{path}", timeout=0.5, attempts=1, **LOCAL)
    assert time.perf_counter() - begin < 1.4


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_trouble_is_tried_again_within_the_same_fetch(site, status):
    path = f"flaky/{status}/2/{uuid.uuid4().hex}"
    assert only(f"{site}/{path}", **LOCAL).value["width"] == 40
    assert Site.asked[path] == 3


def test_trouble_that_stays_is_tried_a_few_times_and_trouble_that_lasts_once(site):
    for status, times, error in ((503, 3, Passing), (404, 1, ImageMissing)):
        path = f"flaky/{status}/99/{uuid.uuid4().hex}"
        with pytest.raises(error):
            only(f"{site}/{path}", **LOCAL)
        assert Site.asked[path] == times


def test_a_host_that_asks_for_an_hour_of_peace_gets_it(site):
    before = Site.asked["busy"]
    with pytest.raises(Passing, match="429"):
        only(f"{site}/busy", **LOCAL)
    assert Site.asked["busy"] == before + 1


def test_a_host_that_fails_again_and_again_is_left_alone_and_costs_the_others_nothing(site, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_module, "DEAD_AFTER", 0.0)
    (tmp_path / "a.png").write_bytes(PNG)
    path = f"flaky/503/999/{uuid.uuid4().hex}"
    dead, fine = [f"{site}/{path}"] * 40, [f"{tmp_path}/a.png"] * 5
    _, replies = fetch(*dead, *fine, per_host=2, attempts=1, allow_roots=[str(tmp_path)], **LOCAL)
    assert all(isinstance(reply, Passing) for reply in replies[:40])
    assert "in a row" in str(replies[39])
    assert all(reply.value for reply in replies[40:])
    assert Site.asked[path] < 6


def test_an_answer_about_one_picture_says_that_its_host_works(site, monkeypatch):
    monkeypatch.setattr(engine_module, "DEAD_AFTER", 0.0)
    path = f"flaky/503/999/{uuid.uuid4().hex}"
    turns = [f"{site}/{path}", f"{site}/404"] * 10
    _, replies = fetch(*turns, per_host=1, attempts=1, **LOCAL)
    assert Site.asked[path] == 1  # one at a time, the first failure is enough to rest
    _, replies = fetch(*turns, per_host=4, attempts=1, **LOCAL)
    assert sum(isinstance(reply, ImageMissing) for reply in replies) == 10


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_picture_that_comes_packed_unasked_is_unpacked(site, encoding):
    assert only(f"{site}/packed/{encoding}", **LOCAL).value["sha256"] == sha256(JPEG).hexdigest()


@pytest.mark.parametrize(
    ("path", "error", "why"),
    [
        ("bomb", ImageRefused, "more than 20,000,000 bytes"),
        ("damaged", ImageUnreadable, "damaged|decoded"),
        ("br", ImageRefused, "packed with br"),
    ],
)
def test_what_was_packed_to_do_harm_is_not_unpacked(site, path, error, why):
    with pytest.raises(error, match=why):
        only(f"{site}/packed/{path}", **LOCAL)


def test_redirects_in_circles_are_refused(site):
    with pytest.raises(ImageRefused, match="more than 5 times"):
        only(f"{site}/circle/a", **LOCAL)


def test_a_body_cut_to_the_length_its_header_claims_is_unreadable(site):
    with pytest.raises(ImageUnreadable, match=r"cannot be decoded"):
        only(f"{site}/cut", **LOCAL)


def test_more_hosts_than_connections_are_kept_for_are_all_served(site, monkeypatch):
    monkeypatch.setattr(engine_module, "CLIENTS", 2)
    by_name = site.replace("127.0.0.1", "localhost")
    hosts = [site, by_name, site.replace("127.0.0.1", "127.0.0.2"), site]
    _, replies = fetch(*(f"{host}/a.jpg" for host in hosts), allow_hosts=["127.0.0.1", "127.0.0.2", "localhost"])
    assert sum(bool(getattr(reply, "value", None)) for reply in replies) >= 3  # 127.0.0.2 is there on Linux alone


def test_a_message_shows_no_control_characters_and_no_endless_address():
    for uri in ("http://a\x1b[31m/x", "data:," + "x" * 10_000, "/etc/\n" + "y" * 10_000):
        with pytest.raises(ImageRefused) as refused:
            only(uri)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_a_body_that_breaks_off_is_passing_trouble(site):
    with pytest.raises(
        Passing, match=r"RemoteProtocolError peer closed connection without sending complete message body"
    ):
        only(f"{site}/short", timeout=2.0, **LOCAL)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/a.jpg", "http://no-such-host.invalid/a.jpg"])
def test_nobody_there_is_passing_trouble(uri):
    with pytest.raises(Passing):
        only(uri, **LOCAL)


@pytest.mark.parametrize("uri", ["http://", "https:///a.jpg", "http://[::1/a.jpg", "http://a:99999/x"])
def test_a_url_that_is_none_is_refused(uri):
    with pytest.raises(ImageRefused):
        only(uri)


def test_one_host_is_asked_no_more_than_its_share_at_a_time(site):
    begin = time.perf_counter()
    _, replies = fetch(*[f"{site}/slow"] * 4, per_host=2, **LOCAL)
    assert all(reply.value for reply in replies)
    assert time.perf_counter() - begin > 2.9


@pytest.mark.parametrize(
    "address",
    "10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 fe80::1%eth0 ::1 fc00::1 "
    "ff02::1 ::ffff:10.0.0.1 64:ff9b::a00:1 2002:a00:1:: 2001:db8::1".split(),
)
def test_an_address_inside_a_network_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_an_address_on_the_internet_is_public(address):
    assert is_public(address)
