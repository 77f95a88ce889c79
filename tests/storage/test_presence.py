"""Runs that know of each other share work; a hint that is wrong or gone costs nothing but that."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

from storage import presence
from storage.presence import Presence, live, present


def test_runs_have_places_in_the_order_in_which_they_began(files):
    with present(files, "caption") as one:
        assert one.place() == (0, 1)
        with present(files, "caption") as two, present(files, "score"):
            assert (one.place(), two.place()) == ((0, 2), (1, 2))
            assert len(live(files)) == 3
        assert one.place() == (0, 1)
    assert live(files) == []


def test_a_run_that_died_is_ignored_after_a_while(files, monkeypatch):
    dead = Presence(files, "caption")
    dead.renew()
    assert live(files, "caption") == [dead.name]
    monkeypatch.setattr(presence, "DEAD_AFTER", -1.0)
    assert live(files, "caption") == []
    assert Presence(files, "caption").place() == (0, 1)


def test_a_killed_run_on_this_machine_is_gone_at_once(files):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    content = {"at": time.time(), "host": socket.gethostname(), "pid": process.pid}
    files.write("runs/caption/1.json", json.dumps(content).encode())
    files.write("runs/caption/2.json", json.dumps({**content, "host": "elsewhere"}).encode())
    assert live(files) == ["runs/caption/1.json", "runs/caption/2.json"]
    process.kill()
    process.wait()
    assert live(files) == ["runs/caption/2.json"]


def test_a_run_renews_its_file_but_not_all_the_time(files, monkeypatch):
    run = Presence(files, "caption")
    run.renew()
    first = json.loads(files.read(run.name))["at"]
    run.renew()
    assert json.loads(files.read(run.name))["at"] == first
    monkeypatch.setattr(presence, "RENEWED_EVERY", 0.0)
    time.sleep(0.01)
    run.renew()
    assert json.loads(files.read(run.name))["at"] > first


def test_a_file_that_is_no_hint_is_no_run(files):
    files.write("runs/caption/1.json", b"{")
    files.write("runs/caption/2.json", b"{}")
    assert live(files) == []


def test_a_run_that_fails_leaves_nothing_behind(files):
    try:
        with present(files, "caption"):
            raise ValueError
    except ValueError:
        assert files.names("runs") == []
