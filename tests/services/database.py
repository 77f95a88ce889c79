"""A Postgres of this machine, for the length of the tests: a cluster of its own, which root makes as another user."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

SERVER_USER = "postgres"  # what Debian's package makes; the programs refuse to run as root


def programs() -> Path | None:
    """The folder of the newest initdb of the machine; Debian keeps them off the path."""
    known = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    found = str(known[-1]) if known else shutil.which("initdb")
    return Path(found).parent if found else None


class Postgres:
    """A cluster on one port of this machine, with one user, its password and one database."""

    def __init__(self, port: int, user: str, password: str, database: str):
        found = programs()
        assert found, "sh tests/services/install installs Postgres"
        self.bin, self.port, self.database, self.password = found, port, database, password
        self.address = ["--host=127.0.0.1", f"--port={port}", f"--username={user}"]
        self.folder = Path(tempfile.mkdtemp(prefix="mllmsrec-postgres-"))  # pytest's own is closed to other users
        given = self.folder / "password"
        given.write_text(password)
        if os.getuid() == 0:
            owner = pwd.getpwnam(SERVER_USER)
            for path in (self.folder, given):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        data = self.folder / "data"
        self._run("initdb", f"--pgdata={data}", f"--username={user}", f"--pwfile={given}", "--auth=scram-sha-256")
        self._run("pg_ctl", f"--pgdata={data}", "--wait", f"--log={self.folder / 'log'}",
                  f"--options=-p {port} -h 127.0.0.1 -k {self.folder}", "start")  # fmt: skip
        self._run("createdb", *self.address, database)

    def ready(self, check: list[str]) -> bool:
        """Whether the health check (`pg_isready` and its words) says so of this cluster."""
        words = [str(self.bin / check[0]), *check[1:], "--host=127.0.0.1", f"--port={self.port}"]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def ask(self, query: str) -> str:
        """The one value that a query returns, as text."""
        words = [
            str(self.bin / "psql"),
            *self.address,
            "--no-align",
            "--tuples-only",
            f"--command={query}",
            self.database,
        ]
        environment = {**os.environ, "PGPASSWORD": self.password}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def stop(self) -> None:
        self._run("pg_ctl", f"--pgdata={self.folder / 'data'}", "--wait", "--mode=immediate", "stop")
        shutil.rmtree(self.folder)

    def said(self) -> str:
        return (self.folder / "log").read_text("utf-8")

    def _run(self, program: str, *words: str) -> None:
        """One of Postgres's programs, as who may run it. Raises RuntimeError with what all of them said."""
        as_user = ["runuser", "-u", SERVER_USER, "--"] if os.getuid() == 0 else []
        environment = {**os.environ, "PGPASSWORD": self.password, "LC_ALL": "C"}
        said = self.folder / "said"
        with said.open("ab") as out:  # a file: a pipe would stay open as long as the server that pg_ctl leaves behind
            command = [*as_user, str(self.bin / program), *words]
            done = subprocess.run(command, env=environment, cwd="/", stdout=out, stderr=out, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{said.read_text()}")
