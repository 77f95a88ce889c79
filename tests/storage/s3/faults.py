"""An HTTP proxy that breaks things on purpose: some requests are refused, cut, delayed or answered in half.

Knows nothing of S3 beyond the error it answers with.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["slow_down", "internal", "cut_before", "cut_after", "stall", "half", "short", "damaged", "denied"]
FAULTS: tuple[Fault, ...] = (
    "slow_down",
    "internal",
    "cut_before",
    "cut_after",
    "stall",
    "half",
    "short",
)  # of any request
ANSWERS = {
    "slow_down": (503, "SlowDown"),
    "internal": (500, "InternalError"),
    "damaged": (400, "BadDigest"),
    "denied": (403, "AccessDenied"),
}
HOPS = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}  # for one connection, not for both


class Proxy(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1 while it is entered, in front of the server at `target` (`host:port`).

    Each request meets the next of `script` (None: no fault), and when that is empty a fault at `rate`, drawn from
    `faults` by `seed`. `seen` lists method, path and fault of every request.

    - `slow_down`, `internal`, `damaged`, `denied`: an error of the server, which never heard of the request;
    - `cut_before`, `cut_after`: the connection ends before, or after, the server did what was asked;
    - `stall`: the server does it, and the reply waits for `stall_seconds`;
    - `half`: half of the body of the reply, then the connection ends (as `cut_after` where there is no body);
    - `short`: half of the body with a header that calls it the whole (likewise).
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: str, seed: int = 0, stall_seconds: float = 1.2) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.seed, self.stall_seconds, self._lock = target, seed, stall_seconds, threading.Lock()
        self.mend()

    def mend(self) -> None:
        """No faults any more, nothing seen, and the draws begin anew."""
        self.rate, self.faults, self.script = 0.0, FAULTS, deque[Fault | None]()
        self.seen: list[tuple[str, str, Fault | None]] = []
        self._random = random.Random(self.seed)

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, fault: Fault | None) -> int:
        """How many requests met this fault."""
        return sum(1 for _, _, met in self.seen if met == fault)

    def meet(self, method: str, path: str) -> Fault | None:
        """What happens to this request."""
        with self._lock:
            if self.script:
                fault = self.script.popleft()
            else:
                fault = self._random.choice(self.faults) if self._random.random() < self.rate else None
            self.seen.append((method, path, fault))
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is part of the game."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def _relay(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.meet(self.command, self.path)
        if fault in ANSWERS:
            status, code = ANSWERS[fault]
            self._reply(status, [], f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode())
            return
        if fault == "cut_before":
            self._cut()
            return
        status, headers, content = self._ask(sent)
        if fault == "stall":
            time.sleep(self.server.stall_seconds)
        if fault == "cut_after" or (fault in ("half", "short") and not content):
            self._cut()
        elif fault == "half":
            self._reply(status, headers, content, half=True)
            self._cut()
        elif fault == "short":
            self._reply(status, headers, content[: len(content) // 2])
        else:
            self._reply(status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay

    def _ask(self, sent: bytes) -> tuple[int, Sequence[tuple[str, str]], bytes]:
        connection = HTTPConnection(self.server.target, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOPS}
        try:
            connection.request(self.command, self.path, sent or None, headers | {"Content-Length": str(len(sent))})
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: Sequence[tuple[str, str]], content: bytes, half: bool = False) -> None:
        self.send_response_only(status)
        length = len(content)
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = int(value)  # of what a GET would bring
            elif name.lower() not in HOPS:
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: length // 2] if half else content)

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
