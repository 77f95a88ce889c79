"""What Prefect adds to a run: the scripted demo as a flow on a warm server, beside the same stages without Prefect.

    python -m benchmarks.prefect_overhead [TIMES]

Each run is a fresh process on a new store; the two ways take turns, so that a busy machine slows both. Timed inside the
process are the whole of it (imports included) and the run alone. The server is one of this machine on SQLite, and has
run one flow before. At most `MOST_SECONDS` may be added to a run; more ends the script with 1.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_SECONDS = 5.0
ROOT = Path(__file__).parents[1]
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
}


def one_run(way: str, store: str) -> None:
    """The scripted demo into `store`; prints the seconds it took without imports, and those since this was imported."""
    began = time.perf_counter()
    from flows.settings import load

    config = load(["demo"], ["model=scripted", "audit.model=scripted", f'settings.store="{store}"'], {})
    if way == "flow":
        from flows.pipeline import pipeline

        ready = time.perf_counter()
        pipeline(config.params, config.settings)
    else:
        from tasks.report import write_report
        from tasks.runner import How
        from tasks.stage_task import STAGE_BY_NAME, perform
        from tasks.work import open_work

        ready = time.perf_counter()
        work, stages = open_work(config.to_json()), {}
        for name in STAGE_BY_NAME:
            stages[name], _ = perform(work, name, stages, How(config.settings.window), {})
        work.store.envs.move(config.settings.env, stages)
        write_report(work, config.settings.env)
    ended = time.perf_counter()
    print(f"seconds {ended - ready} {ended - began}")


@contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """A Prefect server in its own process; the environment that leads to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            if process.poll() is not None:
                sys.exit(f"the server did not start:\n{(folder / 'server.log').read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=3)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield {**environment, "PREFECT_API_URL": url}
    finally:
        process.terminate()
        process.wait(60)


def timed(way: str, store: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of the run alone, and with its imports, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.prefect_overhead", way, str(store)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    _, alone, whole = next(line for line in done.stdout.splitlines() if line.startswith("seconds ")).split()
    return float(alone), float(whole)


def main(times: int) -> None:
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as environment:
        timed("flow", Path(folder) / "warm", environment)
        ways = ("bare", "flow")
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(times):
            for way in ways:
                found[way].append(timed(way, Path(folder) / f"{way}{number}", environment))
    middle = {way: [statistics.median(column) for column in zip(*found[way], strict=True)] for way in ways}
    print(f"{'':14}{'bare':>9}{'flow':>9}{'added':>9}{'ratio':>8}   median of {times}")
    for row, name in enumerate(("run", "with imports")):
        bare, flow = middle["bare"][row], middle["flow"][row]
        print(f"{name:14}{bare:8.1f}s{flow:8.1f}s{flow - bare:8.1f}s{flow / bare:8.2f}")
    sys.exit(max(flow - bare for bare, flow in zip(*middle.values(), strict=True)) > MOST_SECONDS)


if __name__ == "__main__":
    if sys.argv[1:2] and not sys.argv[1].isdigit():
        one_run(*sys.argv[1:3])
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 3)
