"""Trouble that passes costs time and nothing else; trouble that stays says what to do."""

import pytest
from faults import FAULTS

from mllmsrec_core.errors import StoreError, UsageError
from storage import files as module
from storage.files import Files

TWICE = [[fault, fault] for fault in FAULTS]


@pytest.mark.parametrize("faults", [*TWICE, ["damaged"] * 2], ids=[*FAULTS, "damaged"])
def test_a_write_is_sent_until_it_is_there(files, during, faults):
    during(faults, lambda: files.write("x", b"content"))
    assert files.read("x") == b"content"


@pytest.mark.parametrize("faults", TWICE, ids=FAULTS)
def test_a_read_is_whole_whatever_happens_on_the_way(files, during, faults):
    files.write("x", bytes(range(256)) * 100)
    assert (
        during([None, *faults], lambda: files.read("x")) == bytes(range(256)) * 100
    )  # the second request brings the body


@pytest.mark.parametrize("faults", TWICE, ids=FAULTS)
def test_who_creates_wins_although_the_reply_is_lost(files, during, faults):
    assert during(faults, lambda: files.create("x", b"mine"))
    assert files.read("x") == b"mine"


@pytest.mark.parametrize("faults", TWICE, ids=FAULTS)
def test_who_comes_second_loses_whatever_happens_on_the_way(files, during, faults):
    files.write("x", b"theirs")
    assert not during(faults, lambda: files.create("x", b"mine"))
    assert files.read("x") == b"theirs"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_there_and_what_is_not_stays_so(files, during, fault):
    files.write("a/x", b"1")
    assert during([fault], lambda: files.names("")) == ["a/x"]
    assert during([fault], lambda: files.names("b")) == []
    assert during([fault], lambda: files.size("a/x")) == 1
    assert not during([fault], lambda: files.exists("a/y"))
    with pytest.raises(FileNotFoundError):
        during([fault], lambda: files.read("a/y"))


@pytest.mark.parametrize("faults", TWICE, ids=FAULTS)
def test_what_is_removed_is_gone(files, during, faults):
    files.write("a/x", b"1")
    files.write("a/y", b"1")
    during(faults, lambda: files.remove("a"))
    assert files.names("") == []


def test_a_dead_server_is_named_with_what_to_do_when_patience_ends(files, line, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    line.rate, line.faults = 1.0, ("cut_before",)
    for action in (lambda: files.write("x", b"1"), lambda: files.read("x"), lambda: files.names("")):
        with pytest.raises(StoreError, match=r"s3://.*repeat the command when the store answers again"):
            action()


def test_no_trouble_lasts_longer_than_it_is_waited_for(files, line, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.0)
    line.rate, line.faults = 1.0, ("internal",)
    with pytest.raises(StoreError, match=rf"InternalError: on purpose \({module.ATTEMPTS} attempts"):
        files.write("x", b"1")
    assert line.count("internal") == module.ATTEMPTS


def test_a_missing_bucket_fails_at_once(url, line, files):
    elsewhere, before = Files("s3://no-such-bucket-here/store"), len(line.seen)
    for action in (
        lambda: elsewhere.write("x", b"1"),
        lambda: elsewhere.create("x", b"1"),
        lambda: elsewhere.read("x"),
        lambda: elsewhere.names(""),
    ):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket-here/.*no such bucket; create it, or check --store"):
            action()
    assert len(line.seen) - before <= 8


def test_refused_access_fails_at_once_and_says_where_credentials_come_from(files, line):
    line.rate, line.faults = 1.0, ("denied",)
    for action in (
        lambda: files.write("x", b"1"),
        lambda: files.create("x", b"1"),
        lambda: files.read("x"),
        lambda: files.names(""),
        lambda: files.exists("x"),
        lambda: files.size("x"),
        lambda: files.remove("x"),
    ):
        before = len(line.seen)
        with pytest.raises(StoreError, match=r"s3://.*AWS_ACCESS_KEY_ID.*AWS_PROFILE.*AWS_ENDPOINT_URL"):
            action()
        assert len(line.seen) == before + 1


def test_no_credentials_at_all_says_where_they_come_from(url, options, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    alone = Files(
        url, {**options, "client_kwargs": {"region_name": "us-east-1"}}
    )  # a session that has not yet seen the credentials
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        alone.read("x")


@pytest.mark.parametrize(("wrong", "why"), [({"endpoint_ur": "x"}, "endpoint_ur"), ({"profile": "nobody"}, "nobody")])
def test_a_wrong_option_is_named_before_anything_is_sent(url, line, wrong, why):
    before = len(line.seen)
    with pytest.raises((UsageError, StoreError), match=why):
        Files(url, wrong)
    assert len(line.seen) == before
