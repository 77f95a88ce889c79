"""The engine that fetches pictures.

A URI comes from a dataset and is untrusted: a path must lie below an allowed root once links are followed, a web
address must be public unless its host is allowed, and every redirect is checked like the first. Bytes are untrusted
too: they are counted while they arrive, and a picture's pixels before it is decoded. A host is asked by few at a time,
again after passing trouble, and left alone for a while when nothing helps. Knows nothing of items or stages.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import random
import socket
import time
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, TypeVar

import httpx
from fsspec.core import split_protocol

from mllmsrec_core.ask import Ask, Fetch, Reply
from mllmsrec_core.datasets import demo
from mllmsrec_core.errors import (
    AskError,
    EngineError,
    ImageMissing,
    ImageRefused,
    ImageUnreadable,
    Passing,
    StoreError,
)
from storage.blobs import Blobs
from storage.places import Places, parts, shown, within
from storage.source import inside
from tasks.engines.pictures import MAX_PIXELS, check, reduced

T = TypeVar("T")

MAX_BYTES = 20_000_000
MAX_REDIRECTS = 5
CLIENTS = 256  # hosts whose connections are kept open
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address

LONGEST_WAIT = 10.0  # seconds between two attempts, also where a host asks for more
DEAD_AFTER = 30.0  # seconds in which a host failed every fetch, `per_host` of them at least
REST = 60.0  # seconds for which it is left alone then

AGAIN = "then `mllmsrec retry --stage images --class image_refused`"  # a refusal is an answer, and stands until then


class Busy(Passing):
    """The host asks to be left alone for `seconds`."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass
class Host:
    """How many may ask a host at a time, and how it has answered of late; times are of the monotonic clock."""

    turns: asyncio.Semaphore
    failed: int = 0  # fetches in a row
    since: float = 0.0  # when the first of them ended
    rests_until: float = 0.0

    def answered(self) -> None:
        self.failed = 0

    def gave_trouble(self, enough: int) -> None:
        self.failed += 1
        self.since = time.monotonic() if self.failed == 1 else self.since
        if self.is_dead(enough):
            self.rests_until = time.monotonic() + REST

    def is_dead(self, enough: int) -> bool:
        """Whether at least `enough` fetches failed in a row, and for long."""
        return self.failed >= enough and time.monotonic() - self.since >= DEAD_AFTER


class FetchEngine:
    """Answers Fetch: the bytes go to the blob store, the reply says their sha256, width and height.

    A picture of more pixels than the Ask allows goes there as a smaller copy, whatever `keep` says, so that the answer is
    the same; one within them goes byte for byte. `max_pixels` are the most that a picture may have to be read at all.
    `allow_roots`: the only folders and URLs (any fsspec file system) pictures are read below, from archives too.
    `allow_hosts`: `host` or `host:port` that may be fetched from although its address is not public. `keep`: bytes read
    below the roots are copied into the store or kept by reference; those of the web are always copied. `timeout`:
    seconds for one of `attempts`. `wait`: seconds before the second one at most, then twice as many.
    """

    name = "fetch"
    answers: frozenset[type[Ask]] = frozenset({Fetch})

    def __init__(
        self,
        blobs: Blobs,
        *,
        allow_roots: Sequence[str] = (),
        allow_hosts: Collection[str] = (),
        keep: Literal["copy", "reference"] = "copy",
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        timeout: float = 20.0,
        attempts: int = 3,
        wait: float = 1.0,
        per_host: int = 8,
    ) -> None:
        self.blobs = blobs
        self.allow_roots = tuple(allow_roots)
        self.allow_hosts = frozenset(allow_hosts)
        self.keep = keep
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self.timeout = timeout
        self.attempts = attempts
        self.wait = wait
        self.per_host = per_host
        self.hosts: dict[str, Host] = defaultdict(lambda: Host(asyncio.Semaphore(per_host)))
        self.places = Places()
        self.threads = ThreadPoolExecutor(per_host, thread_name_prefix="fetch")
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        self.tls = httpx.create_ssl_context()
        self.clients: OrderedDict[str, httpx.AsyncClient] = OrderedDict()

    async def answer(self, ask: Ask) -> Reply:
        assert isinstance(ask, Fetch), "the runner sends only kinds in `answers`"
        begin, uri = time.monotonic(), ask.uri
        host = self.hosts[_host(uri)]
        async with host.turns:  # until the bytes are kept, so that few wait in memory for a decoder
            content = await self._content(uri, host)
            kept, about = await self._in(self.decoders, lambda: self._fitted(content, ask))
            about["sha256"] = await self._in(self.threads, lambda: self._keep(kept, uri, changed=kept is not content))
        return Reply(about, seconds=time.monotonic() - begin, engine=self.name)

    async def close(self) -> None:
        for client in self.clients.values():
            await client.aclose()
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.decoders.shutdown(wait=False, cancel_futures=True)

    async def _content(self, uri: str, host: Host) -> bytes:
        """The bytes at `uri`, asked for again after passing trouble, unless its host is at rest."""
        if time.monotonic() < host.rests_until:
            raise Passing(f"{shown(uri)}: {_host(uri)} failed {host.failed} times in a row; the next run tries again")
        try:
            content = await self._tried(uri, host)
        except Passing:
            host.gave_trouble(self.per_host)
            raise
        except AskError:
            host.answered()
            raise
        host.answered()
        return content

    async def _tried(self, uri: str, host: Host) -> bytes:
        """Files behind a network are tried again where they are read, and a host that was dead only once after its rest."""
        patient = _is_web(uri) and not host.is_dead(self.per_host)
        for attempt in range(self.attempts if patient else 1):
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._once(uri)
            except (TimeoutError, Passing) as error:
                asked = error.seconds if isinstance(error, Busy) else 0.0
                if not patient or attempt == self.attempts - 1 or asked > LONGEST_WAIT:
                    if isinstance(error, Passing):
                        raise
                    raise Passing(f"{shown(uri)} took more than {self.timeout:g} s") from error
                wait = min(LONGEST_WAIT, self.wait * 2**attempt)
                await asyncio.sleep(max(asked, random.uniform(wait / 2, wait)))
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, uri: str) -> bytes:
        if _is_web(uri):
            return await self._download(uri)
        read = self._draw if uri.startswith("demo:") else self._read
        return await self._in(self.threads, lambda: read(uri))

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def _fitted(self, content: bytes, ask: Fetch) -> tuple[bytes, dict[str, Any]]:
        """What is to be kept of a picture, and the answer about it but for its sha256."""
        width, height = check(content, self.max_pixels, shown(ask.uri))
        if ask.max_pixels is None:
            return content, {"width": width, "height": height}
        kept = content
        if width * height > ask.max_pixels:
            kept, (width, height) = reduced(content, ask.max_pixels)
        return kept, {"width": width, "height": height, "original_sha256": sha256(content).hexdigest()}

    def _keep(self, content: bytes, uri: str, changed: bool) -> str:
        if self.keep == "copy" or changed or _is_web(uri) or uri.startswith("demo:"):
            return self.blobs.put(content)
        return self.blobs.refer(content, uri)

    def _draw(self, uri: str) -> bytes:
        try:
            return demo.picture(uri)
        except (ValueError, KeyError, LookupError) as error:
            raise ImageMissing(f"the demo shop has no picture {shown(uri)}") from error

    def _read(self, uri: str) -> bytes:
        """The bytes of a file, or of an archive's member, below an allowed root."""
        name = shown(uri)
        try:
            if not any(inside(parts(uri)[0], root) for root in self.allow_roots):
                raise ImageRefused(
                    f"{name} lies outside the allowed roots ({', '.join(self.allow_roots) or 'none'}); admit its folder by "
                    f"settings.image_roots, {AGAIN}"
                )
            return self.places.read(uri, self.max_bytes)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ImageMissing(f"nothing is at {name}") from error
        except (PermissionError, ValueError) as error:  # ValueError: a NUL in the path
            raise ImageMissing(f"{name} cannot be read: {error}") from error
        except StoreError as error:  # what `steadily` makes of trouble that lasts
            denied = isinstance(error.__cause__, PermissionError)
            raise (ImageMissing if denied else Passing)(f"{name} could not be read: {error}") from error
        except ImportError as error:
            raise EngineError(f"{name} needs a file system that is not installed: {error}") from error
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise ImageMissing(f"{name} cannot be read: {error}") from error
            raise Passing(f"{name} could not be read: {error}") from error

    async def _download(self, uri: str) -> bytes:
        """The body behind `uri` after at most MAX_REDIRECTS redirects, each checked like the first address."""
        name = shown(uri)
        if not _is_url(uri):
            raise ImageRefused(f"{name} is no valid URL")
        url = httpx.URL(uri)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._get(url)
                try:
                    if not response.has_redirect_location:
                        return await self._body(response, name)
                    url = url.join(response.headers["Location"])
                finally:
                    await response.aclose()
        except httpx.InvalidURL as error:
            raise ImageRefused(f"{name} leads to an invalid URL: {error}") from error
        except httpx.HTTPError as error:
            raise Passing(f"{name}: {type(error).__name__} {error}".rstrip()) from error
        raise ImageRefused(f"{name} redirects more than {MAX_REDIRECTS} times")

    async def _get(self, url: httpx.URL) -> httpx.Response:
        """The response from the very address that was checked, so that a second look-up cannot lead elsewhere."""
        if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65_535:
            raise ImageRefused(f"{shown(str(url))} is not at a web address")
        address, host = await self._address(url), url.netloc.decode("ascii")
        client = self._client(f"{url.scheme}://{host}")
        # Plain encoding: a picture is compressed already, and a bomb need not be.
        headers = {"Host": host, "Accept-Encoding": "identity"}
        extensions = {"sni_hostname": url.raw_host.decode("ascii")} if url.scheme == "https" else {}
        request = client.build_request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)
        return await client.send(request, stream=True)

    def _client(self, origin: str) -> httpx.AsyncClient:
        """One pool for each host: hosts that share an address must not share a connection verified for one of them."""
        if origin in self.clients:
            self.clients.move_to_end(origin)
        else:
            # Environment proxies would fetch addresses that were never checked here.
            self.clients[origin] = httpx.AsyncClient(
                trust_env=False, verify=self.tls, timeout=self.timeout, headers={"User-Agent": "mllmsrec"}
            )
            if len(self.clients) > CLIENTS:
                _, oldest = self.clients.popitem(last=False)
                # Whoever still reads through it ends within the time of one attempt.
                asyncio.get_running_loop().call_later(2 * self.timeout, lambda: asyncio.ensure_future(oldest.aclose()))
        return self.clients[origin]

    async def _address(self, url: httpx.URL) -> str:
        """The address to connect to. Raises ImageRefused unless all of the host's are public or the host is allowed."""
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            host = url.raw_host.decode("ascii").strip("[]")
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise Passing(f"{url.host} has no address: {error}") from error
        addresses = [str(info[4][0]) for info in found]
        if not self.allow_hosts & {url.host, f"{url.host}:{port}"} and not all(map(is_public, addresses)):
            raise ImageRefused(
                f"{url.host} has an address that is not public ({', '.join(addresses)}); allow it by "
                f"settings.allow_hosts, {AGAIN}"
            )
        return addresses[0]

    async def _body(self, response: httpx.Response, name: str) -> bytes:
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise Busy(f"{name}: HTTP {status}", _retry_after(response))
        if status != 200:
            raise ImageMissing(f"{name}: HTTP {status}")
        content = bytearray()
        async for piece in response.aiter_raw():  # Content-Length is a claim; what arrives is counted
            content += piece
            within(len(content), self.max_bytes, name)
        return self._unpacked(bytes(content), response.headers.get("Content-Encoding", ""), name)

    def _unpacked(self, content: bytes, encoding: str, name: str) -> bytes:
        """The picture in a body that came packed although it was not asked to be, never more than `max_bytes` of it."""
        match encoding.strip().lower():
            case "gzip" | "x-gzip" | "deflate":
                try:
                    content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, self.max_bytes + 1)
                except zlib.error as error:
                    raise ImageUnreadable(f"{name} is damaged: {error}") from error
                within(len(content), self.max_bytes, name)
            case "br" | "zstd" | "compress":
                raise ImageRefused(f"{name} came packed with {encoding} although plain bytes were asked for")
        return content


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address inside it, is reachable by anyone on the internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _is_web(uri: str) -> bool:
    return uri.lower().startswith(("http:", "https:"))


def _host(uri: str) -> str:
    """What is asked by few at a time and may be down as one: a web host, a bucket, or all local files."""
    place = parts(uri)[0]
    if _is_web(place):
        return httpx.URL(place).host if _is_url(place) else ""
    scheme, path = split_protocol(place)
    return "local files" if scheme in (None, "file", "local") else f"{scheme}://{path.partition('/')[0]}"


def _retry_after(response: httpx.Response) -> float:
    """The seconds for which a host asks to be left alone; 0 where it says none, or a date."""
    with suppress(ValueError):
        return max(0.0, float(response.headers.get("Retry-After", "")))
    return 0.0


def _is_url(uri: str) -> bool:
    try:
        return bool(httpx.URL(uri).host)
    except httpx.InvalidURL:
        return False
