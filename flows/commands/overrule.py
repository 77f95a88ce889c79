"""Overruling answers that stand: correct one by hand, or open many to be asked again. Both are recorded."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.commands.shared import Env, Json, Profiles, StoreUrl, configure, emit, failures_as_exit_codes, pairs, say
from mllmsrec_core.errors import UsageError
from tasks.config import Config

Where = Annotated[str | None, typer.Option(help="with --reask: only rows for which this SQL expression is true")]
WhyAgain = Annotated[str | None, typer.Option(help="with --reask: the reason, which is kept")]
NO_REASON = "no reason given"


def correct(
    words: Annotated[list[str], typer.Argument(metavar="item ID", help="item ID")],
    why: Annotated[str, typer.Option(help="the reason, which is kept and shown")],
    caption: Annotated[str | None, typer.Option(help="the right caption of the item's picture")] = None,
    summary: Annotated[str | None, typer.Option(help="the right summary of the item")] = None,
    ban: Annotated[
        bool, typer.Option("--ban", help="the answer is never to be used; the row counts as failed")
    ] = False,
    reask: Annotated[bool, typer.Option("--reask", help="the next run asks again, and the new answer holds")] = False,
    of: Annotated[
        Literal["caption", "summary"] | None, typer.Option(help="what to ban or ask again; default caption")
    ] = None,
    by: Annotated[str, typer.Option(help="who says so, kept and shown as written; default nobody's name")] = "",
    profiles: Profiles = [],
    store: StoreUrl = None,
    env: Env = None,
    as_json: Json = False,
) -> None:
    """Overrule the caption or summary of one item, by text, ban or asking again; the next run follows it through."""
    from tasks.overrule import correct as overrule
    from tasks.work import open_work

    with failures_as_exit_codes(as_json):
        item = pairs(words, ("item",), "`mllmsrec correct item B01 --caption TEXT --why TEXT`")["item"]
        ways = [name for name, given in _ways(caption, summary, ban, reask).items() if given]
        if len(ways) != 1:
            raise UsageError("say one of --caption TEXT, --summary TEXT, --ban and --reask; " + _said(ways))
        subject = "caption" if caption is not None else "summary" if summary is not None else of or "caption"
        if of not in (None, subject):
            raise UsageError(f"--{subject} corrects the {subject}, and --of says `{of}`: leave --of out")
        config = configure(profiles, [], store, env)
        text = caption if caption is not None else summary
        done = overrule(
            open_work(config.to_json()),
            config.settings.env,
            item,
            of=subject,
            text=text,
            ban=ban,
            reask=reask,
            why=why,
            by=by,
        )
        if as_json:
            emit("corrected", item=item, of=subject, how=ways[0].lstrip("-"), said=done)
        else:
            say(str(done))


def _ways(caption: str | None, summary: str | None, ban: bool, reask: bool) -> dict[str, bool]:
    return {"--caption": caption is not None, "--summary": summary is not None, "--ban": ban, "--reask": reask}


def _said(ways: list[str]) -> str:
    return f"you said {' and '.join(ways)}" if ways else "you said none"


def open_again(config: Config, sample: int, stage: str, where: str | None, why: str | None, as_json: bool) -> int:
    """Open the standing answers of a stage, or those of rows that `where` names; the next run asks them again."""
    from tasks.overrule import reask
    from tasks.work import environment, open_work

    env = environment(config, sample)
    opened = reask(open_work(config.to_json()), env, stage, where, why or NO_REASON, "")
    if as_json:
        emit("reask", stage=stage, where=where, answers=opened)
    else:
        say(f"{stage}: {opened:,} answer{'s' if opened != 1 else ''} opened to be asked again")
    return opened
