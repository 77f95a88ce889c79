"""A whole run on S3 over a bad line publishes what a run on a local folder does, and keeps no secret."""

import json

import pytest
from conftest import KEYS

from storage.files import Files


def digests(records):
    return {
        (stage, table): pointer["digest"]
        for stage, record in records.items()
        for table, pointer in record["tables"].items()
        if stage != "report"
    }


@pytest.fixture
def on_s3(url, options, small):
    """The small shop with its store on S3."""
    config = "connect_timeout = 1, read_timeout = 1, retries = { total_max_attempts = 1 }"
    inline = f'{{ endpoint_url = "{options["endpoint_url"]}", config_kwargs = {{ {config} }} }}'
    return small(url, settings__storage_options=inline)


def test_a_run_over_a_bad_line_publishes_the_tables_of_a_local_run(on_s3, url, small, run_all, line, caplog):
    line.rate = 0.2
    records = run_all(on_s3)
    assert len({fault for _, _, fault in line.seen if fault}) > 4, "hardly any fault was met"
    line.rate = 0.0
    assert digests(records) == digests(run_all(small()))
    assert {stage: record["fingerprint"] for stage, record in run_all(on_s3).items()} == {
        stage: record["fingerprint"] for stage, record in records.items()
    }
    files = Files(url)
    kept = {name: files.read(name) for name in files.names("")}
    assert any(name.endswith("manifest.json") for name in kept)
    for secret in KEYS.values():
        assert [name for name, content in kept.items() if secret.encode() in content] == []
        assert secret not in caplog.text
        assert secret not in json.dumps(records)
