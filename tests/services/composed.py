"""The services of docker-compose.yml without Docker: their commands, environments, secrets and health checks, as it wires them.

What differs is written down here and nowhere else: hosts are this machine, ports are free ones, and the volumes are
folders. Knows nothing of what the services do.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .database import Postgres

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")  # ${NAME}, ${NAME:-default}, ${NAME-default}
PROGRAMS = str(Path(sys.executable).parent)  # prefect and mllmsrec, as in the images
LISTENS = {"server": 4200, "worker": 8080, "gpu-worker": 8080, "postgres": 5432, "s3": 8333}  # inside their containers
PATIENCE = 180  # seconds for a service to become healthy: a new database takes most of a minute on a busy machine


class Service:
    """A service that runs: its processes, its log, and whether it is healthy by compose's own check."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path, check: list[str]):
        self.name, self.log, self.check, self.environment = name, log, check, dict(environment)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def healthy(self) -> bool:
        """What `docker ps` would say of it."""
        return subprocess.run(self.check, env=self.environment, capture_output=True, check=False).returncode == 0

    def wait_until_healthy(self) -> None:
        """Raises RuntimeError with the end of the log if it ends, or is not healthy in time."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.healthy():
                return
            time.sleep(0.5)
        raise RuntimeError(f"{self.name} did not become healthy:\n{self.said()[-4000:]}")

    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def kill(self) -> list[int]:
        """SIGKILL for it and everything it started, all at one moment, as when the machine dies; their process ids."""
        doomed = [self.process.pid, *descendants(self.process.pid)]
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        return doomed

    def stop(self, patience: float = 30) -> None:
        """As `docker stop`: asked first, then killed."""
        if self.process.poll() is None:
            children = descendants(self.process.pid)
            for pid in [*children, self.process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process.poll() is None:
                self.kill()


class Composed:
    """The services of one `docker compose up`, in one folder, on ports of their own; Postgres runs at once.

    `variables` are those of `.env`. `beside` are added to every service's environment.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str], beside: Mapping[str, str]):
        self.folder, self.beside = folder, dict(beside)
        self.ports = {name: free_port() for name in LISTENS}
        self.variables = {"PREFECT_PORT": str(self.ports["server"]), "S3_PORT": str(self.ports["s3"]), **variables}
        self.running: list[Service] = []
        subprocess.run(["sh", str(ROOT / "docker" / "make-secrets"), str(folder / "secrets")], check=True)
        wanted = COMPOSE["services"]["postgres"]["environment"]
        self.database = Postgres(
            self.ports["postgres"], wanted["POSTGRES_USER"], self.secret("postgres_password"), wanted["POSTGRES_DB"]
        )

    def start(self, name: str, *, command: list[str] | None = None, wait: bool = True) -> Service:
        """The service by the command of compose (or another one), behind the script that reads its secrets."""
        made = Service(
            name,
            ["sh", str(ROOT / "docker" / "with-secrets"), *(command or self.command(name))],
            self.environment(name),
            self.folder / f"{name}.log",
            self.check(name),
        )
        self.running.append(made)
        if wait:
            made.wait_until_healthy()
        return made

    def stop(self) -> None:
        """Every service, the last one first."""
        for service in reversed(self.running):
            service.stop()
        self.database.stop()

    def run(self, name: str, *command: str) -> str:
        """What `docker compose run --rm NAME COMMAND` prints. Raises RuntimeError with all it said if it fails."""
        done = subprocess.run(
            ["sh", str(ROOT / "docker" / "with-secrets"), *command],
            env=self.environment(name), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def command(self, name: str) -> list[str]:
        """Its command; a server listens on this machine only, and a Prefect server is told its port."""
        words = [self._here(str(word)) for word in COMPOSE["services"][name]["command"]]
        return [*words, "--port", str(self.ports["server"])] if name == "server" else words

    def environment(self, name: str) -> dict[str, str]:
        """What the container would see, and nothing of who calls: compose's variables, its image's, its secrets' folder."""
        home = self._made(f"home-{name}")
        given = COMPOSE["services"][name].get("environment", {})
        image = {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "HOME": str(home), "LANG": "C.UTF-8",
                 "PREFECT_HOME": str(home), "HF_HOME": str(home), "PYTHONUNBUFFERED": "1"}  # fmt: skip
        ports = {"PREFECT_SERVER_DATABASE_PORT": str(self.ports["postgres"]),
                 "PREFECT_WORKER_WEBSERVER_PORT": str(self.ports.get(name, 0))}  # fmt: skip
        return {
            **image,
            **ports,
            **{key: "127.0.0.1" if value in LISTENS else self._here(str(value), home) for key, value in given.items()},
            "SECRETS_FOLDER": str(self._secrets(name)),
            **self.beside,
        }

    def check(self, name: str) -> list[str]:
        """The command of its health check, as it is run inside the container."""
        _, *words = COMPOSE["services"][name]["healthcheck"]["test"]
        inside = f"localhost:{LISTENS[name]}"
        return [str(word).replace(inside, f"localhost:{self.ports[name]}") for word in words]

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text("utf-8").strip()

    @property
    def url(self) -> str:
        """Where the UI is."""
        return f"http://localhost:{self.ports['server']}"

    def _secrets(self, name: str) -> Path:
        """The service's /run/secrets."""
        folder = self._made(f"secrets-{name}")
        for entry in COMPOSE["services"][name].get("secrets", []):
            source, target = (entry, entry) if isinstance(entry, str) else (entry["source"], entry["target"])
            (folder / target).write_text(self.secret(source))
        return folder

    def _here(self, text: str, home: Path | None = None) -> str:
        """Variables filled in, then names of services, open addresses and volumes as they are on this machine."""
        text = VARIABLE.sub(lambda found: self.variables.get(found[1], found[2] or ""), text)
        for name, port in self.ports.items():
            text = text.replace(f"://{name}:{LISTENS[name]}", f"://127.0.0.1:{port}")
        text = text.replace("0.0.0.0", "127.0.0.1")
        return text.replace("/prefect/", f"{home}/") if home and text.startswith("/prefect/") else text

    def _made(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
    found, open_ = [], [pid]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += below
    return found
