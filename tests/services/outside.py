"""A proxy that lets nothing through and remembers what was asked of it: whoever reaches for another machine is seen here."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Outside(ThreadingHTTPServer):
    """Listens on a free port of this machine while it is entered. `asked` lists the hosts or addresses that were wanted."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Refusal)
        self.asked: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        """What makes ordinary HTTP clients come here for every machine but this one."""
        here, this = f"http://127.0.0.1:{self.server_port}", "127.0.0.1,localhost"
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        return {**dict.fromkeys(names, here), "NO_PROXY": this, "no_proxy": this}

    def __enter__(self) -> Outside:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Refusal(BaseHTTPRequestHandler):
    server: Outside

    def _refuse(self) -> None:
        self.server.asked.append(self.path)
        self.send_error(403, "this is a test without network")

    do_CONNECT = do_GET = do_POST = do_PUT = do_HEAD = _refuse

    def log_message(self, *_: object) -> None:
        """Silent; `asked` is the log."""
