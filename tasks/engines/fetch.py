"""The engine that fetches pictures.

A URI comes from a dataset and is untrusted: a path must lie below an allowed root once links are followed, a web
address must be public unless its host is allowed, and every redirect is checked like the first. Bytes are untrusted
too: they are counted while they arrive, and a picture's pixels before it is decoded. Knows nothing of items or stages.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import fsspec
import httpx
from fsspec.core import split_protocol

from mllmsrec_core.ask import Ask, Fetch, Reply
from mllmsrec_core.datasets import demo
from mllmsrec_core.errors import EngineError, ImageMissing, ImageRefused, Passing, StoreError
from storage.blobs import Blobs
from storage.files import steadily
from storage.source import inside
from tasks.engines.pictures import MAX_PIXELS, check

T = TypeVar("T")

MAX_BYTES = 20_000_000
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address


class FetchEngine:
    """Answers Fetch: the bytes go to the blob store, the reply says their sha256, width and height.

    `allow_roots`: the only folders and URLs (any fsspec file system) pictures are read below. `allow_hosts`: `host` or
    `host:port` that may be fetched from although its address is not public. `timeout`: seconds for one picture in all.
    """

    name = "fetch"
    answers: frozenset[type[Ask]] = frozenset({Fetch})

    def __init__(
        self,
        blobs: Blobs,
        *,
        allow_roots: Sequence[str] = (),
        allow_hosts: Collection[str] = (),
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        timeout: float = 20.0,
        per_host: int = 8,
    ) -> None:
        self.blobs = blobs
        self.allow_roots = tuple(allow_roots)
        self.allow_hosts = frozenset(allow_hosts)
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self.timeout = timeout
        self.turns: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(per_host))
        self.threads = ThreadPoolExecutor(per_host, thread_name_prefix="fetch")
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        self.tls = httpx.create_ssl_context()
        self.clients: dict[str, httpx.AsyncClient] = {}

    async def answer(self, ask: Ask) -> Reply:
        assert isinstance(ask, Fetch), "the runner sends only kinds in `answers`"
        begin = asyncio.get_running_loop().time()
        content = await self._content(ask.uri)
        sha256, width, height = await self._in(self.decoders, lambda: self._keep(content, ask.uri))
        seconds = asyncio.get_running_loop().time() - begin
        return Reply({"sha256": sha256, "width": width, "height": height}, seconds=seconds, engine=self.name)

    async def close(self) -> None:
        for client in self.clients.values():
            await client.aclose()
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.decoders.shutdown(wait=False, cancel_futures=True)

    async def _content(self, uri: str) -> bytes:
        scheme = (split_protocol(uri)[0] or "file").lower()
        where = httpx.URL(uri).host if scheme in ("http", "https") and _is_url(uri) else scheme
        async with self.turns[where]:
            try:
                async with asyncio.timeout(self.timeout):
                    if scheme in ("http", "https"):
                        return await self._download(uri)
                    read = self._draw if scheme == "demo" else self._read
                    return await self._in(self.threads, lambda: read(uri))
            except TimeoutError as error:
                raise Passing(f"{uri} took more than {self.timeout:g} s") from error

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def _keep(self, content: bytes, uri: str) -> tuple[str, int, int]:
        width, height = check(content, self.max_pixels, uri)
        return self.blobs.put(content), width, height

    def _draw(self, uri: str) -> bytes:
        try:
            return demo.picture(uri)
        except (ValueError, KeyError, LookupError) as error:
            raise ImageMissing(f"the demo shop has no picture {uri}") from error

    def _read(self, uri: str) -> bytes:
        """The bytes of a file below an allowed root."""
        try:
            if not any(inside(uri, root) for root in self.allow_roots):
                raise ImageRefused(f"{uri} lies outside the allowed roots ({', '.join(self.allow_roots) or 'none'})")
            scheme, path = split_protocol(uri)
            if scheme in (None, "file", "local"):
                return self._read_local(os.path.realpath(path), uri)
            return steadily(uri, lambda: self._read_remote(uri))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ImageMissing(f"nothing is at {uri}") from error
        except (PermissionError, ValueError) as error:  # ValueError: a NUL in the path
            raise ImageMissing(f"{uri!r} cannot be read: {error}") from error
        except StoreError as error:  # what `steadily` makes of trouble that lasts
            denied = isinstance(error.__cause__, PermissionError)
            raise (ImageMissing if denied else Passing)(f"{uri} could not be read: {error}") from error
        except ImportError as error:
            raise EngineError(f"{uri} needs a file system that is not installed: {error}") from error
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise ImageMissing(f"{uri} cannot be read: {error}") from error
            raise Passing(f"{uri} could not be read: {error}") from error

    def _read_remote(self, uri: str) -> bytes:
        fs, path = fsspec.url_to_fs(uri)
        self._within(fs.size(path) or 0, uri)
        return fs.cat_file(path)

    def _read_local(self, path: str, uri: str) -> bytes:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(path)
        if not stat.S_ISREG(found.st_mode):
            raise ImageRefused(f"{uri} is a device or a pipe, not a file")
        self._within(found.st_size, uri)
        with open(path, "rb") as file:
            content = file.read(self.max_bytes + 1)
        self._within(len(content), uri)
        return content

    def _within(self, size: int, uri: str) -> None:
        if size > self.max_bytes:
            raise ImageRefused(f"{uri} has more than {self.max_bytes:,} bytes")

    async def _download(self, uri: str) -> bytes:
        """The body behind `uri` after at most MAX_REDIRECTS redirects, each checked like the first address."""
        if not _is_url(uri):
            raise ImageRefused(f"{uri} is no valid URL")
        url = httpx.URL(uri)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._get(url)
                try:
                    if not response.has_redirect_location:
                        return await self._body(response, uri)
                    url = url.join(response.headers["Location"])
                finally:
                    await response.aclose()
        except httpx.InvalidURL as error:
            raise ImageRefused(f"{uri} leads to an invalid URL: {error}") from error
        except httpx.HTTPError as error:
            raise Passing(f"{uri}: {type(error).__name__} {error}".rstrip()) from error
        raise ImageRefused(f"{uri} redirects more than {MAX_REDIRECTS} times")

    async def _get(self, url: httpx.URL) -> httpx.Response:
        """The response from the very address that was checked, so that a second look-up cannot lead elsewhere."""
        if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65_535:
            raise ImageRefused(f"{url} is not at a web address")
        address, host = await self._address(url), url.netloc.decode("ascii")
        client = self._client(f"{url.scheme}://{host}")
        # Plain encoding: a picture is compressed already, and a bomb need not be.
        headers = {"Host": host, "Accept-Encoding": "identity"}
        extensions = {"sni_hostname": url.raw_host.decode("ascii")} if url.scheme == "https" else {}
        request = client.build_request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)
        return await client.send(request, stream=True)

    def _client(self, origin: str) -> httpx.AsyncClient:
        """One pool for each host: hosts that share an address must not share a connection verified for one of them."""
        if origin not in self.clients:
            # Environment proxies would fetch addresses that were never checked here.
            self.clients[origin] = httpx.AsyncClient(
                trust_env=False, verify=self.tls, timeout=self.timeout, headers={"User-Agent": "mllmsrec"}
            )
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
            raise ImageRefused(f"{url.host} has an address that is not public ({', '.join(addresses)})")
        return addresses[0]

    async def _body(self, response: httpx.Response, uri: str) -> bytes:
        status = response.status_code
        if status in (408, 425, 429) or status >= 500:
            raise Passing(f"{uri}: HTTP {status}")
        if status != 200:
            raise ImageMissing(f"{uri}: HTTP {status}")
        content = bytearray()
        async for piece in response.aiter_bytes():  # Content-Length is a claim; what arrives is counted
            content += piece
            self._within(len(content), uri)
        return bytes(content)


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


def _is_url(uri: str) -> bool:
    try:
        return bool(httpx.URL(uri).host)
    except httpx.InvalidURL:
        return False
