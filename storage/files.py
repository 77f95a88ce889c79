"""One root on one fsspec file system: the few operations everything else in the store is built from.

A file is whole or absent: local writes go to a temporary file, are flushed to disk and renamed; object stores take one
PUT (from 100 MB on a multipart upload, which shows nothing before its end); memory is atomic as it is. Nothing is changed
in place. On a store behind a network, trouble that passes is waited out. Knows no credentials: the client libraries find
them in the environment.
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

import fsspec
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mllmsrec_core.errors import StoreError, UsageError, nearest

T = TypeVar("T")

# Waiting for a store behind a network. On the way here botocore has sent a request up to five times within about ten
# seconds: after 5xx, throttling, a refused or cut connection, a timeout, a listing that broke off; aiohttp has sent it
# once more where a connection it had kept was closed. Neither covers a file that breaks off while it is read, nor more
# than those seconds. The second loop of s3fs around botocore is turned off (`_opened`): this one does the same and more,
# and two would multiply.
ATTEMPTS = 10
FIRST_WAIT, LONGEST_WAIT = 0.2, 10.0  # seconds: the upper end of the first wait, doubled each time, and of any
PATIENCE = 120.0  # seconds; no attempt starts after that

PASSING_STATUS = frozenset({408, 409, 429})  # and all from 500 on; 409: another request about the same key is under way
# What S3 says with status 400 of a request that stalled or was damaged on its way.
PASSING_CODES = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"})
PASSING_ERRNO = frozenset({errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO)})  # 503, a cut body, 500

SECRET = re.compile(r"key|secret|token(?!s|iz)|password|credential|connection_string", re.IGNORECASE)
# user:password@ at the beginning of a URL; `host:9000/` is a port, and `container@account` holds no secret.
USERINFO = re.compile(r"(?<=://)[^/@:]*:(?!\d+(?:/|$))[^@]*@")
USE_THE_ENVIRONMENT = (
    "give credentials by the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL "
    "for a server of your own; FSSPEC_S3_KEY and the like; HF_TOKEN for the hub, settings.api_key_env for endpoints"
)
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.tmp$")  # what `_temporary` names its files


class Files:
    """Paths are relative to the root, with forward slashes.

    `options` go to the fsspec file system (`endpoint_url`, `profile`, `anon`, `client_kwargs`, ...). Raises UsageError for
    a secret in them or in the URL, and for a file system that is not installed.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        refuse_secrets(url, options or {})
        self.fs, root = _opened(url, options or {})
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.remote = not isinstance(self.fs, LocalFileSystem | MemoryFileSystem)
        self.url = url

    def path(self, name: str) -> str:
        """The file system's own path of `name`."""
        return f"{self.root}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write `name` so that it is whole or absent. Raises StoreError when the store cannot take it."""
        path = self.path(name)
        with _writing(path):
            if not self.local:
                self.steadily(name, lambda: self.fs.pipe_file(path, content))
                return
            temporary = _temporary(path, content)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
            _sync_folder(os.path.dirname(path))

    def create(self, name: str, content: bytes) -> bool:
        """Write `name` unless it exists; False when it does. Two racers never both win, as long as their bytes differ."""
        path = self.path(name)
        try:
            with _writing(path):
                if self.remote:
                    return self._create_remote(name, content)
                if not self.local:
                    self.fs.pipe_file(path, content, mode="create")
                    return True
                temporary = _temporary(path, content)
                try:
                    os.link(temporary, path)
                finally:
                    os.unlink(temporary)
                _sync_folder(os.path.dirname(path))
                return True
        except FileExistsError:
            return False

    def _create_remote(self, name: str, content: bytes) -> bool:
        """A conditional PUT. When its reply is lost, the client libraries or `steadily` send it again, and it finds the file
        it made; they do not tell, so the bytes say whose it is."""

        def put() -> bool:
            try:
                self.fs.pipe_file(self.path(name), content, mode="create")
            except OSError as error:
                if not isinstance(error, FileExistsError) and _status(error) != 412:  # precondition failed
                    raise
                return self._whole(name) == content
            return True

        return self.steadily(name, put)

    def read(self, name: str) -> bytes:
        """All bytes of `name`. Raises FileNotFoundError, and StoreError for a remote store that does not hand them out."""
        return self.steadily(name, lambda: self._whole(name)) if self.remote else self.fs.cat_file(self.path(name))

    def _whole(self, name: str) -> bytes:
        path = self.path(name)
        size = self._info(name)["size"]
        if size == 0:
            return b""
        # `start` asks for the whole in one request; without it s3fs asks for the size once more
        content = self.fs.cat_file(path, start=0) if size else self.fs.cat_file(path)
        if size is not None and len(content) != size:
            raise OSError(errno.EIO, f"{len(content):,} of {size:,} bytes came")
        return content

    def _info(self, name: str) -> dict[str, Any]:
        info = self.fs.info(self.path(name))
        if info["type"] != "file":
            raise FileNotFoundError(self.path(name))
        return info

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return self.steadily(name, lambda: self.fs.exists(self.path(name)))

    def size(self, name: str) -> int | None:
        """Bytes in `name`; None where there is no such file."""
        try:
            return self.steadily(name, lambda: self._info(name)["size"])
        except FileNotFoundError:
            return None

    def names(self, under: str, suffix: str = "") -> list[str]:
        """Every file below the folder `under` whose name ends with `suffix`, sorted; empty where there is no folder.

        What an interrupted write left behind is no file.
        """
        return sorted(name for name in self._found(under) if name.endswith(suffix) and not LEFTOVER.search(name))

    def _found(self, under: str) -> list[str]:
        base = self.path(under)
        try:
            paths = self.steadily(under, lambda: [str(path) for path in self.fs.find(base)])
        except FileNotFoundError:
            return []
        return [path[len(self.root) + 1 :] for path in paths if not path.endswith("/")]  # S3 consoles make `folder/`

    def leftovers(self, older_than_seconds: float) -> list[str]:
        """Temporary files of writes that were killed, by name, sorted; younger ones may still be at work.

        Only local stores have any. Unfinished multipart uploads are invisible: a lifecycle rule of the bucket ends them.
        """
        if not self.local:
            return []
        before = time.time() - older_than_seconds
        return sorted(name for name in self._found("") if LEFTOVER.search(name) and _changed(self.path(name)) <= before)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with everything below it; nothing happens where there is none.

        Raises StoreError when a remote store keeps it.
        """

        def remove() -> None:
            with suppress(FileNotFoundError):  # another writer may have been faster
                if self.remote and has_magic(self.path(name)):  # `rm` would take the name for a pattern
                    for path in self.fs.find(self.path(name)):
                        self.fs.rm_file(path)
                else:
                    self.fs.rm(self.path(name), recursive=True)
            if self.remote and self.fs.exists(self.path(name)):  # s3fs passes over what a bulk delete could not delete
                raise OSError(errno.EBUSY, "still there after it was removed; may these credentials delete?")

        self.steadily(name, remove)

    def steadily(self, name: str, action: Callable[[], T]) -> T:
        """What `action`, which touches `name` and may be repeated, returns; on a remote store passing trouble is waited out.

        There it raises StoreError for other trouble, and for trouble that does not pass; FileNotFoundError and
        FileExistsError go through.
        """
        if not self.remote:
            return action()
        return steadily(str(self.fs.unstrip_protocol(self.path(name))), action)


def steadily(where: str, action: Callable[[], T]) -> T:
    """`Files.steadily` for any place on a remote file system; `where` names it in errors."""
    started = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return action()
        except (OSError, *_client_errors()) as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and _code(error) != "NoSuchBucket":
                raise
            if not _passing(error):
                raise StoreError(_lasting(where, error)) from error
            seconds = time.monotonic() - started
            if attempt == ATTEMPTS or seconds > PATIENCE:
                raise StoreError(
                    f"{where}: {_said(error)} ({attempt} attempts in {seconds:.0f} s). Everything written before is kept; "
                    "repeat the command when the store answers again."
                ) from error
        time.sleep(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))))
    raise AssertionError("counted to the end")


def refuse_secrets(url: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError, which does not repeat them, for credentials in a URL or in options: both reach logs and manifests."""
    if USERINFO.search(url):
        raise UsageError(f"{USERINFO.sub('...@', url)} holds credentials; take them out and {USE_THE_ENVIRONMENT}.")
    for name, value in _settings(options):
        if SECRET.search(name):
            raise UsageError(f"option `{name}` may hold a secret; take it out and {USE_THE_ENVIRONMENT}.")
        if isinstance(value, str) and USERINFO.search(value):
            raise UsageError(f"option `{name}` holds credentials; take them out and {USE_THE_ENVIRONMENT}.")


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every name and value in nested options; what stands in a list has the list's name."""
    if isinstance(value, Mapping):
        for inner, one in value.items():
            yield str(inner), None
            yield from _settings(one, str(inner))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _settings(one, name)
    else:
        yield name, value


def _opened(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system and the root's path in it; listings are not cached, as others write here too."""
    try:
        ours = copy.deepcopy(dict(options))  # botocore writes into what it is given
        fs, root = fsspec.url_to_fs(url, use_listings_cache=False, **ours)
        if "s3" in fs.protocol:
            fs.retries = 1  # see ATTEMPTS
            fs.connect()  # no request yet; a wrong option or profile shows here
    except ImportError as error:
        how = "pip install -e '.[s3]'" if url.startswith(("s3:", "s3a:")) else f"install its package ({error})"
        raise UsageError(f"the file system of {url} is not installed: {how}") from error
    except ValueError as error:
        known = fsspec.available_protocols()
        raise UsageError(f"{url}: {error}; {nearest(url.partition(':')[0], known)}") from error
    except TypeError as error:
        raise UsageError(
            f"settings.storage_options for {url}: {error}; check the names of {sorted(options)}"
        ) from error
    except _client_errors() as error:
        raise StoreError(_lasting(url, error)) from error
    return fs, root


@cache
def _client_errors() -> tuple[type[Exception], ...]:
    """What the clients behind s3fs raise that is no OSError; empty where they are not installed."""
    try:
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError  # a listing or an error message that broke off
    except ImportError:
        return ()
    return HttpError, BotoCoreError, ClientError, ResponseParserError


def _passing(error: Exception) -> bool:
    """Whether the same request may succeed later: throttling, 5xx, connections, timeouts, bodies that broke off."""
    status = _status(error)
    if status is not None:
        return status in PASSING_STATUS or status >= 500 or _code(error) in PASSING_CODES
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING_ERRNO
    return isinstance(error, _connection_errors())


@cache
def _connection_errors() -> tuple[type[Exception], ...]:
    """Those of `_client_errors` that say that a connection failed, stalled or broke off."""
    try:
        from aiohttp import ClientError as HttpError
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
    except ImportError:
        return ()
    broken = (boto.IncompleteReadError, boto.FlexibleChecksumError, ResponseParserError)
    return HttpError, boto.HTTPClientError, boto.ConnectionError, *broken


def _response(error: BaseException) -> Mapping[str, Any]:
    """What botocore keeps of the server's answer, in the error or in the one s3fs made of it; empty elsewhere."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, Mapping):
            return response
    return {}


def _status(error: BaseException) -> int | None:
    """The HTTP status that the server answered with, if it did."""
    return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _code(error: BaseException) -> str | None:
    """The name that S3 gives the error, if it answered with one."""
    return _response(error).get("Error", {}).get("Code")


def _said(error: BaseException) -> str:
    """The error in its own words, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    code = _code(error)
    return " ".join((f"{code}: {text}" if code and code not in text else text).split()).rstrip(".")


def _lasting(where: str, error: Exception) -> str:
    """What to do about trouble that stays."""
    if _code(error) == "NoSuchBucket":
        return f"{where}: there is no such bucket; create it, or check --store and AWS_ENDPOINT_URL."
    if isinstance(error, PermissionError) or isinstance(error, _client_errors()):
        may = "they must be allowed to list, read, write and delete there"
        return f"{where}: {_said(error)}. Access was refused or not even asked for; {USE_THE_ENVIRONMENT}; {may}."
    return f"{where}: {_said(error)}. Everything written before is kept; fix access, then repeat the command."


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Turn what the system says of a failed write into one clear error; FileExistsError goes through."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        why = "no space left" if error.errno == errno.ENOSPC else str(error)
        raise StoreError(
            f"cannot write {path}: {why}. Everything written before is kept; free space or fix access, then repeat the "
            "command."
        ) from error


def _temporary(path: str, content: bytes) -> str:
    """A file beside `path` with this content, flushed to disk; nothing is left of it when that fails."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def _changed(path: str) -> float:
    """When a local file was changed last, in seconds since 1970; the far future for one that has just gone."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return float("inf")


def _sync_folder(folder: str) -> None:
    """Make a rename survive a power cut: the name stands in the folder, not in the file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
