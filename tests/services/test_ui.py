"""A browser opens a deployment, fills the form and watches the run; what it saw is kept in test-output/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from mllmsrec_core.stages import STAGES

from .composed import ROOT, Composed
from .conftest import CHROMIUM, Prefect, wait_for

KEPT = ROOT / "test-output"
NAMES = [stage.name for stage in STAGES]
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


class Browser:
    """A page of Chromium, logged in; `see("form")` keeps what it shows as test-output/form.png."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url, self.hosts = page, url, set[str]()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))  # "" for data: and blob:

    def log_in(self, login: str) -> None:
        self.page.goto(f"{self.url}/login")
        box = self.page.locator("input").first
        box.wait_for()
        box.fill(login)
        box.press("Enter")
        self.page.wait_for_url("**/dashboard")

    def open(self, path: str) -> None:
        self.page.goto(self.url + path)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).or_(self.page.get_by_text(name, exact=True)).first.click()

    def read(self, pattern: str, seconds: float = 30) -> str:
        """The text of the page once `pattern` is in it. Fails the test with the text if it does not come."""
        body = self.page.locator("body")
        if not wait_for(lambda: re.search(pattern, body.inner_text()), seconds):
            self.see("failed")
            pytest.fail(f"no {pattern!r} in {body.inner_text()}")
        return body.inner_text()

    def see(self, name: str) -> None:
        KEPT.mkdir(exist_ok=True)
        self.page.screenshot(path=KEPT / f"{name}.png")

    def field(self, *titles: str) -> Any:
        """The box of a form's field, by the titles of those it lies in and its own."""
        box = self.page.locator("form")
        for title in titles:
            label = self.page.locator(
                ":scope > .p-label__header .schema-form-property__label",
                has_text=re.compile(rf"^{title}( \(Optional\))?$", re.IGNORECASE),
            )
            box = box.locator(".schema-form-property", has=label).first
        return box


@pytest.fixture(scope="module")
def browser(composed: Composed) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        proxy = {"server": "http://127.0.0.1:9", "bypass": "localhost,127.0.0.1"}  # Chromium's own chatter ends there
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, proxy=proxy)  # type: ignore[arg-type]
        made = Browser(chromium.new_page(viewport={"width": 1400, "height": 1600}), composed.url)
        made.log_in(composed.secret("prefect_login"))
        yield made
        chromium.close()


@pytest.fixture
def form(browser: Browser, api: Prefect, deployed: str) -> Browser:
    """At the form of a run of the whole pipeline, reached from the list of deployments."""
    browser.open("/deployments")
    browser.page.locator(f"a[href*='{api.deployment(deployed)['id']}']").first.click()
    browser.page.get_by_role("button", name="Run", exact=True).click()
    browser.page.get_by_text("Custom run").click()
    browser.field("params", "Caption").wait_for()
    return browser


def runs(api: Prefect, deployed: str) -> list[dict[str, Any]]:
    return api.runs(deployments={"id": {"any_": [api.deployment(deployed)["id"]]}})


def test_the_form_shows_stages_in_order_with_what_was_deployed(form: Browser):
    form.see("form")
    text = form.read("Audit")
    places = [text.index(f"\n{name.capitalize()} (Optional)") for name in NAMES]
    assert places == sorted(places)
    assert form.field("params", "Ingest", "Demo", "Items").locator("input").input_value() == "30"
    choice = form.field("params", "Sft", "Strategy").locator("button.p-select-button__control")
    choice.focus()
    choice.press("Space")  # a click would scroll, and scrolling closes the list
    offered = form.page.locator(".p-select-option__text")
    offered.first.wait_for()
    form.see("form-choice")
    assert [option.inner_text() for option in offered.all()] == ["none", "lora", "qlora"]


def test_a_bad_parameter_is_refused_by_the_form_and_no_run_is_made(form: Browser, api: Prefect, deployed: str):
    before = len(runs(api, deployed))
    form.field("params", "Caption", "Max Tokens").locator("input").fill("-5")
    form.page.get_by_role("button", name="Submit").click()
    assert "-5 is less than the minimum of 1" in form.read("params.caption.max_tokens")
    form.see("form-refused")
    assert len(runs(api, deployed)) == before


def test_a_run_from_the_form_completes_and_shows_artifacts_then_cached_badges(
    form: Browser, api: Prefect, deployed: str, worker
):
    known = {run["id"] for run in runs(api, deployed)}

    def new() -> str:
        found = [run["id"] for run in runs(api, deployed) if run["id"] not in known]
        known.update(found)
        return found[-1] if found else ""

    form.field("params", "Caption", "Max Tokens").locator("input").fill("77")
    form.page.get_by_role("button", name="Submit").click()
    first = wait_for(new, 30)
    assert api.wait(first) == "Completed"
    assert api.run(first)["parameters"]["params"]["caption"]["max_tokens"] == 77

    form.open(f"/runs/flow-run/{first}")
    form.read("Completed")
    assert "caption: " in form.read(r"audit: .*\d rows")
    form.see("run-logs")
    form.tab("Artifacts")
    shown = form.read(r"progress-\w+-demo-dev")
    form.see("run-artifacts")
    kinds = ("plan", "stages", "data-card", "metrics", "lineage", "report")
    assert [kind for kind in kinds if not re.search(rf"^{kind}-demo-dev$", shown, re.M)] == []
    form.page.get_by_text("lineage-demo-dev", exact=True).first.click()
    assert "item_summaries" in form.read("recommendations")
    form.see("artifact-lineage")

    form.open(f"/deployments/deployment/{api.deployment(deployed)['id']}/run")  # the form again, as it was deployed
    form.field("params", "Caption", "Max Tokens").locator("input").fill("77")
    form.page.get_by_role("button", name="Submit").click()
    second = wait_for(new, 30)
    assert api.wait(second) == "Completed"
    assert set(api.stages(second).values()) == {"Cached"}
    form.open(f"/runs/flow-run/{second}")
    form.tab("Task Runs")
    assert form.read(rf"(?:\nCached\n[\s\S]*?){{{len(NAMES)}}}").count("\nCached\n") == len(NAMES)
    form.see("run-cached")


def test_the_pages_ask_no_other_machine(browser: Browser):
    assert browser.hosts - {""} == {urlsplit(browser.url).netloc}
