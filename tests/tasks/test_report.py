"""The report, read from environments made by running the real stages with the scripted engine."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest

from mllmsrec_core.errors import UsageError
from mllmsrec_core.stages import STAGES
from storage.corrections import Correction
from storage.store import Store
from tasks.config import Config, Pipeline, Settings
from tasks.report import (
    MADE_BY,
    figures,
    parameters,
    ranking,
    rejects,
    safe,
    short,
    span,
    toml,
    write_page,
    write_report,
)
from tasks.report.shown import Shown, Thumbnails
from tasks.work import Work, open_work

Change = Callable[[pl.DataFrame], pl.DataFrame]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, run_all: Callable[..., Any]) -> Work:
    """Every stage on a shop of 40 items and 15 users, published as `dev`."""
    settings = Settings(store=str(tmp_path_factory.mktemp("report") / "store"))
    params: dict[str, Any] = {"ingest": {"demo": {"items": 40, "users": 15}}}
    config = Config(settings, Pipeline(model="scripted", **params))
    run_all(config)
    return open_work(config.to_json())


@pytest.fixture(scope="module")
def html(work: Work) -> str:
    """The page of the finished environment."""
    return page(work)


def page(work: Work, env: str = "dev") -> str:
    return Path(write_report(work, env)).read_text("utf-8")


def body(html: str) -> str:
    """What stands below the style sheet, on one line."""
    return " ".join(html.split("</style>")[1].split())


def section(html: str, name: str) -> str:
    return html.split(f'<section id="{name}">')[1].split("</section>", maxsplit=1)[0]


def moved(work: Work, env: str, changes: Mapping[str, Change]) -> Work:
    """The environment `dev` again under another name, with some tables changed."""
    stages = {name: dict(record) for name, record in work.store.envs.current("dev")["stages"].items()}
    for record in stages.values():
        record["tables"] = dict(record["tables"])
        for table in record["tables"].keys() & changes.keys():
            frame = changes[table](work.store.tables.read(table, record["tables"][table]["write_id"]))
            p = work.store.tables.publish(table, frame, {})
            record["tables"][table] = {"write_id": p.write_id, "digest": p.digest, "rows": p.rows}
    work.store.envs.move(env, stages)
    return work


def records(work: Work, env: str, change: Callable[[dict[str, Any]], None]) -> Work:
    """The environment `dev` again under another name, with its stage records changed."""
    stages = work.store.envs.current("dev")["stages"]
    change(stages)
    work.store.envs.move(env, stages)
    return work


# --- the page as a whole ---


def test_the_report_is_one_file_at_an_absolute_path_in_the_store(work: Work) -> None:
    path = Path(write_report(work, "dev"))
    assert path.is_absolute() and path.name == "00000001.html" and path.parent.name == "dev"
    assert path.stat().st_size < 5_000_000


def test_in_an_object_store_the_same_page_is_returned_by_its_url(work: Work, html: str) -> None:
    store = Store("memory://report")
    for name in work.store.files.names(""):
        store.files.write(name, work.store.files.read(name))
    url = write_report(replace(work, store=store), "dev")
    assert url.startswith("memory://") and fsspec.filesystem("memory").cat_file(url).decode() == html


def test_the_page_loads_nothing_and_runs_nothing(html: str) -> None:
    assert "<script" not in html and "@import" not in html and "<link" not in html
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', html))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', html))
    assert not re.search(r"url\((?!#)", html)


def test_writing_it_again_writes_the_same_bytes(work: Work, html: str) -> None:
    assert Path(write_page(work.store, "dev", again=True)).read_text("utf-8") == html


def test_a_state_this_version_has_reported_is_not_written_again_unless_asked_for(work: Work) -> None:
    path = Path(write_report(moved(work, "once", {}), "once"))
    mark = path.read_text("utf-8").replace("</body>", "<!-- as it was --></body>")
    path.write_text(mark, "utf-8")
    assert write_report(work, "once") == str(path) and path.read_text("utf-8") == mark
    write_page(work.store, "once", again=True)
    assert "as it was" not in path.read_text("utf-8")


def test_a_page_of_another_version_or_a_new_state_is_written(work: Work) -> None:
    path = Path(write_report(moved(work, "upgraded", {}), "upgraded"))
    path.write_text(path.read_text("utf-8").replace(MADE_BY, "mllmsrec 0.0.1"), "utf-8")
    write_report(work, "upgraded")
    assert MADE_BY in path.read_text("utf-8")
    moved(work, "upgraded", {"captions": lambda frame: frame.with_columns(caption=pl.lit("another"))})
    assert Path(write_report(work, "upgraded")).name == "00000002.html"


def test_a_finished_run_has_every_section_and_misses_nothing(html: str) -> None:
    names = ("stages", "captions", "preferences", "training", "metrics", "calibration", "audit", "errors", "parameters")
    assert [name for name in names if f'<section id="{name}">' in html] == list(names)
    assert "has not run" not in html and "Not run in this environment" not in html
    assert html.count("<svg") == 5  # training, metrics, calibration, and two of the audit
    assert len(set(re.findall(r' id="([^"]+)"', html))) == len(re.findall(r' id="([^"]+)"', html))


def test_captions_and_steps_stand_beside_their_pictures(work: Work, html: str) -> None:
    captions = work.store.tables.read("captions", Shown(work.store, "dev").pointers["captions"]["write_id"])
    assert sum(caption in section(html, "captions") for caption in captions["caption"]) >= 6
    assert section(html, "captions").count("<img") == 6
    assert section(html, "preferences").count("<img") >= 2 * 2 * 3  # two users of two steps of three items at least


def test_metrics_state_chance_list_size_users_and_interval(html: str) -> None:
    html = body(html)
    assert "15 test users, 15 lists" in html and "N = 21 candidates" in html
    assert "HR@10 0.476" in html  # 10 of 21
    assert "95 % interval" in html and "95 % bootstrap intervals over users" in html
    assert all(name in section(html, "metrics") for name in ("model", "ItemKNN", "popularity", "random", "chance"))


def test_the_page_of_a_dry_run_says_that_its_answers_are_made_up(html: str) -> None:
    assert "Dry run: the model <code>scripted</code> gives made-up answers" in html


# --- what is untrusted ---


def test_hostile_titles_and_answers_are_escaped(work: Work) -> None:
    hostile = pl.lit('<script>alert(1)</script> "><img src=x onerror=alert(2)> {{ 7 * 7 }}')
    changes: dict[str, Change] = {
        "items": lambda frame: frame.with_columns(title=hostile),
        "captions": lambda frame: frame.with_columns(caption=hostile),
        "item_summaries": lambda frame: frame.with_columns(summary=hostile, text_summary=hostile),
        "preferences": lambda frame: frame.with_columns(preference=hostile),
        "audit": lambda frame: frame.with_columns(claim=hostile),
    }
    html = page(moved(work, "hostile", changes), "hostile")
    assert "<script" not in html and "<img src=x" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    assert "{{ 7 * 7 }}" in html


def test_the_page_forbids_scripts_and_requests_by_its_own_policy(html: str) -> None:
    assert "default-src 'none'; img-src data:" in html


def test_passwords_in_urls_are_left_out() -> None:
    assert safe("s3://key:secret@bucket/path") == "s3://…@bucket/path"
    assert "secret" not in toml("ingest", {"path": "https://me:secret@host/x"})


# --- what is missing ---


def test_an_environment_with_one_stage_says_which_command_fills_each_section(work: Work) -> None:
    work.store.envs.move("young", {"ingest": work.store.envs.current("dev")["stages"]["ingest"]})
    html = page(work, "young")
    for stage in ("caption", "preference", "sft", "score", "audit"):
        assert f"mllmsrec run --stage {stage}<" in html
    assert "Not run in this environment yet: images, caption, summary" in html


@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_the_report_can_be_written_after_any_stage(work: Work, stage: str) -> None:
    names = [s.name for s in STAGES]
    stages = work.store.envs.current("dev")["stages"]
    work.store.envs.move(f"upto-{stage}", {name: stages[name] for name in names[: names.index(stage) + 1]})
    assert "</html>" in page(work, f"upto-{stage}")


def test_an_unknown_environment_is_a_usage_error_that_names_the_nearest(work: Work) -> None:
    with pytest.raises(UsageError, match="did you mean `dev`"):
        write_report(work, "dav")


def test_empty_tables_are_sentences_not_crashes(work: Work) -> None:
    names = ("captions", "preferences", "adapters", "scores", "metrics", "recommendations", "audit")
    none: dict[str, Change] = {name: lambda frame: frame.clear() for name in names}
    html = page(moved(work, "empty", none), "empty")
    assert "No picture could be captioned" in html and "No adapter was trained" in html


def test_a_table_whose_files_are_gone_is_named_and_the_rest_stands(work: Work) -> None:
    def lose(stages: dict[str, Any]) -> None:
        stages["audit"]["tables"]["audit"]["write_id"] = "gone"

    html = page(records(work, "lost", lose), "lost")
    assert "Files of these tables are gone: audit." in html and section(html, "metrics").count("<svg") == 1


def test_a_picture_that_is_gone_or_broken_leaves_a_blank(work: Work) -> None:
    thumbnail = Thumbnails(work.store)
    assert thumbnail("0" * 64) is None
    assert thumbnail(work.store.blobs.put(b"no picture at all")) is None
    assert thumbnail(None) is None


# --- what must be said ---


def test_embedded_models_on_real_pictures_are_announced_as_poor(work: Work, html: str) -> None:
    def other(stages: dict[str, Any]) -> None:
        stages["caption"]["parts"]["model"]["name"] = "embedded-vlm"
        stages["ingest"]["parts"]["params"]["ingest"]["dataset"] = "movielens"

    assert "captions will be poor" in page(records(work, "toy", other), "toy")
    assert "captions will be poor" not in html


def test_rows_that_are_not_up_to_date_are_counted_and_dated(work: Work, html: str) -> None:
    since = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)

    def age(frame: pl.DataFrame) -> pl.DataFrame:
        old = pl.when(pl.int_range(pl.len()) < 5).then(pl.lit(since)).cast(pl.Datetime("us", "UTC"))
        return frame.with_columns(stale_since=old)

    moved(work, "aged", {"captions": age})
    stages = work.store.envs.current("aged")["stages"]
    stages["caption"]["coverage"] = 0.875
    work.store.envs.move("aged", stages)
    aged = body(page(work, "aged"))
    assert "Stage caption: 87.5 % of its rows are up to date" in aged
    assert "stands since 2026-01-02 03:04 UTC" in aged
    assert "87.5 % up to date" in section(aged, "stages") and "up to date" not in section(html, "stages")


def test_a_pinned_adapter_is_said_to_be_pinned_and_not_out_of_date(work: Work, html: str) -> None:
    change: dict[str, Change] = {"examples": lambda frame: frame.with_columns(position=pl.col("position") + 1)}
    changed = body(page(moved(work, "pinned", change), "pinned"))
    assert "The adapter is pinned: it was trained on an earlier state of the data" in changed
    assert "Pinned since" in section(changed, "training")
    notice = changed.split("Made of older tables than the ones shown: ")[1].split(".")[0]
    assert "score" in notice and "sft" not in notice
    assert "pinned" not in html.casefold()


def test_corrections_in_force_are_listed_with_their_reasons(work: Work, html: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for name in work.store.files.names(""):
        store.files.write(name, work.store.files.read(name))
    captions = Shown(store, "dev").table("captions")
    assert captions is not None
    first, second, *others = captions["ask"].to_list()
    at = datetime(2026, 1, 2, tzinfo=UTC)
    wrong = Correction("replace", "A first guess.", "", at, "wrong")
    right = Correction("replace", "A <b>red</b> mug.", "the shop", at + timedelta(hours=1), "it is a mug")
    again = Correction("reask", None, "", at, "all too short")
    store.corrections.write([(first, "caption", wrong), (second, "caption", again)])
    store.corrections.write([(first, "caption", right), *((key, "caption", again) for key in others)])
    html = Path(write_page(store, "dev", again=True)).read_text("utf-8")
    listed = section(html, "corrections")
    assert f"{len(captions)} answers overruled" in listed
    assert "A &lt;b&gt;red&lt;/b&gt; mug." in listed and "it is a mug" in listed and "the shop" in listed
    assert "A first guess." not in listed  # the newer one holds
    assert f"{len(others) + 1} answers</td>" in listed and listed.count("all too short") == 1
    images = Shown(store, "dev").table("images")
    assert images is not None
    owners = images.join(captions.filter(pl.col("ask") == first), on="sha256", how="semi")["item_id"].sort()
    assert ", ".join(owners.head(5)) in listed


def test_an_environment_without_corrections_has_no_such_section(html: str) -> None:
    assert 'id="corrections"' not in html and "#corrections" not in html


def test_two_environments_stand_side_by_side_where_that_is_asked_for(work: Work, html: str) -> None:
    moved(work, "beside", {"scores": lambda frame: frame.with_columns(-pl.col("logit"))})
    stages = work.store.envs.current("beside")["stages"]
    stages["caption"]["parts"]["params"]["caption"]["prompt"] = "Name <it>. " + "x" * 1_000
    work.store.envs.move("beside", stages)
    path = Path(write_page(work.store, "dev", compare="beside"))
    assert path.name == "00000001.beside-00000002.html"
    compared = section(path.read_text("utf-8"), "compared")
    rows = {cells[0]: cells for cells in rows_of(compared)}
    assert rows["captions"][-1] == "equal" and rows["scores"][-1] == "differs"
    assert "caption.prompt" in rows and "Name &lt;it&gt;. xxx" in compared and "x" * 400 not in compared
    assert "recommendations" in rows and "did not rank the same candidates" not in compared
    assert 'id="compared"' not in html and "#compared" not in html


def rows_of(html: str) -> list[list[str]]:
    """The text of every table cell, row by row."""
    rows = re.findall(r"<tr.*?</tr>", html, re.S)
    return [
        [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)] for row in rows
    ]


def test_a_parameter_is_shown_on_a_few_lines_and_without_passwords() -> None:
    assert short(None) == "–" and short("x") == "x" and short({"a": 1}) == '{"a": 1}'
    assert len(short("x" * 5_000)) < 400
    assert short("s3://me:secret@bucket") == "s3://…@bucket"


def test_stages_made_of_older_tables_are_named(work: Work) -> None:
    changed = moved(work, "stale", {"captions": lambda f: f.with_columns(caption=pl.lit("another"))})
    assert "Made of older tables than the ones shown: summary, audit." in page(changed, "stale")


def test_failures_are_listed_by_stage_and_class(work: Work) -> None:
    def fail(stages: dict[str, Any]) -> None:
        stages["caption"]["counts"] |= {"failed": 3, "errors": {"context_too_long": 2, "empty_reply": 1}}

    errors = section(page(records(work, "failed", fail), "failed"), "errors")
    assert errors.index("context_too_long") < errors.index("empty_reply")


def test_rejects_of_one_kind_are_counted_together(work: Work) -> None:
    reasons = ["there is no item `A`", "there is no item `B`", "a history of 2, shorter than min_history = 3"]

    def reject(frame: pl.DataFrame) -> pl.DataFrame:
        rows = [{"n": n, "source": None, "line": None, "reason": reason} for n, reason in enumerate(reasons, 1)]
        return pl.DataFrame(rows, schema=frame.schema)

    shown = Shown(moved(work, "rejects", {"rejects": reject}).store, "rejects")
    assert rejects(shown) == [("there is no item …", 2), ("a history of …, shorter than min_history = …", 1)]


def test_the_parameters_are_toml_and_those_the_stages_ran_with(work: Work) -> None:
    shown = Shown(work.store, "dev")
    read = tomllib.loads(parameters(shown))
    assert read["ingest"]["demo"]["items"] == 40
    assert read["caption"]["prompt"] == shown.params("caption")["prompt"]
    assert read["summary"]["questions"] == shown.params("summary")["questions"]


# --- figures ---


def metric(scorer: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"scorer": scorer, "metric": "auc", "k": 0, "value": value, "low": low, "high": high, "n_users": 50}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.55, 0.7, "better than chance"), (0.45, 0.6, "cannot be told from chance"), (0.3, 0.45, "worse than chance")],
)
def test_no_more_is_said_of_the_model_than_its_interval_allows(low: float, high: float, words: str) -> None:
    rows = [metric("model", (low + high) / 2, low, high), metric("random", 0.5, 0.5, 0.5)]
    said = ranking.verdicts(pl.DataFrame(rows), ["model", "random"])
    assert len(said) == 1 and words in said[0] and "50 users" in said[0]


def test_overlapping_intervals_settle_nothing() -> None:
    rows = [metric("model", 0.7, 0.6, 0.8), metric("itemknn", 0.65, 0.55, 0.75), metric("popularity", 0.5, 0.45, 0.55)]
    _, knn, popularity = ranking.verdicts(pl.DataFrame(rows), ["model", "itemknn", "popularity"])
    assert "does not settle" in knn and "above popularity" in popularity


def difference(other: str, value: float, low: float, high: float) -> ranking.Difference:
    return ranking.Difference(other, (figures.Interval(value, low, high),), 0.5, 50)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.09, "It is above ItemKNN"),
        (-0.02, 0.12, "cannot be told from ItemKNN"),
        (-0.2, -0.1, "It is below ItemKNN"),
    ],
)
def test_the_difference_on_the_same_lists_decides_and_not_whether_intervals_overlap(
    low: float, high: float, words: str
) -> None:
    rows = pl.DataFrame([metric("model", 0.7, 0.6, 0.8), metric("itemknn", 0.65, 0.55, 0.75)])
    _, said = ranking.verdicts(rows, ["model", "itemknn"], [difference("ItemKNN", (low + high) / 2, low, high)])
    assert words in said and f"{low:+.3f} to {high:+.3f}" in said and "overlap" not in said


def test_paired_differences_are_those_of_the_published_metrics(work: Work) -> None:
    shown = Shown(work.store, "dev")
    table = shown.table("metrics")
    assert table is not None
    value = {row[:3]: row[3] for row in table.filter(slice="all").select("scorer", "metric", "k", "value").rows()}
    columns = [("auc", 0), ("hr", 5), ("ndcg", 10)]
    found = ranking.paired(shown, ["itemknn", "popularity", "random", "somebody else's"], columns)
    assert [one.other for one in found] == ["ItemKNN", "popularity", "random"]
    for name, one in zip(["itemknn", "popularity", "random"], found, strict=True):
        for column, cell in zip(columns, one.cells, strict=True):
            assert cell.value == pytest.approx(value["model", *column] - value[name, *column])
            assert cell.low is not None and cell.high is not None and cell.low <= cell.value <= cell.high


def test_nothing_is_said_of_differences_where_other_interactions_are_shown(work: Work, html: str) -> None:
    assert "The model minus each baseline" in html
    fewer = page(moved(work, "fewer", {"interactions": lambda frame: frame.head(len(frame) - 1)}), "fewer")
    assert "The model minus each baseline" not in fewer and "No paired differences" in fewer


def test_a_slice_of_few_users_shows_no_interval(work: Work) -> None:
    found = ranking.metrics(Shown(work.store, "dev"))
    assert found is not None and any(part.few for part in found.slices)
    assert all(cell.low is None for part in found.slices if part.few for cell in part.cells)


def test_the_cut_off_of_the_chart_leaves_room_for_chance() -> None:
    assert ranking.cut_off([1, 3, 5, 10], (21, 21)) == 5
    assert ranking.cut_off([1, 3, 5, 10], (101, 101)) == 10
    assert ranking.cut_off([1, 3, 5, 10], (2, 2)) == 1


def test_the_wilson_interval_of_none_in_ten_reaches_up_to_0_28() -> None:
    low, high = figures.wilson(0.0, 10)
    assert low == 0.0 and high == pytest.approx(0.2775, abs=1e-4)


def test_equal_predictions_share_one_bin_and_every_candidate_is_counted() -> None:
    frame = pl.DataFrame({"p": [0.3] * 8, "label": [True, False] * 4})
    (only,) = figures.reliability(frame, "p", "x")
    assert only["n"] == 8 and only["observed"] == 0.5
    spread = pl.DataFrame({"p": [i / 40 for i in range(40)], "label": [i % 2 == 0 for i in range(40)]})
    rows = figures.reliability(spread, "p", "x")
    assert len(rows) == 10 and sum(row["n"] for row in rows) == 40


def test_durations_are_said_in_the_unit_one_would_say_them_in() -> None:
    assert [span(s) for s in (0.04, 12.3, 200, 7500)] == ["0.0 s", "12 s", "3 min 20 s", "2 h 5 min"]
