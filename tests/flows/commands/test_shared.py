"""Errors become exit codes, options stand above every other layer, and a stopped run says how to go on."""

from __future__ import annotations

import json
import sys

import pytest
import typer

from flows.commands.shared import (
    configure,
    emit,
    failures_as_exit_codes,
    known_stage,
    pairs,
    resuming,
)
from mllmsrec_core.errors import EngineError, StoreError, TooManyErrors, UsageError


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError, 2), (TooManyErrors, 3), (EngineError, 1), (StoreError, 1), (KeyboardInterrupt, 1)]
)
def test_each_kind_of_error_has_its_exit_code(error, code):
    with pytest.raises(typer.Exit) as ended, failures_as_exit_codes(False):
        raise error("so it is")
    assert ended.value.exit_code == code


def test_an_error_keeps_its_square_brackets(capsys):
    with pytest.raises(typer.Exit), failures_as_exit_codes(False):
        raise UsageError("pip install -e '.[s3]'")
    assert "pip install -e '.[s3]'" in capsys.readouterr().err


def test_an_error_is_one_json_event_where_json_is_wanted(capsys):
    with pytest.raises(typer.Exit), failures_as_exit_codes(True):
        raise TooManyErrors("too many")
    event = json.loads(capsys.readouterr().out)
    assert event == {"event": "error", "kind": "TooManyErrors", "message": "too many", "exit": 3}


def test_a_bug_of_ours_is_not_dressed_up_as_a_message():
    with pytest.raises(ZeroDivisionError), failures_as_exit_codes(False):
        emit("event", value=1 // 0)


def test_ctrl_c_prints_the_command_that_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mllmsrec", "run", "-p", "my shop.toml", "--stage", "caption", "--reask"])
    with pytest.raises(typer.Exit), failures_as_exit_codes(False):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.endswith("  mllmsrec run -p 'my shop.toml' --stage caption\n")


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [
        (
            ["run", "--stage", "a", "--reask", "--where", "x = 1", "--why=bad", "--yes"],
            ["run", "--stage", "a", "--yes"],
        ),
        (["run", "--retrain", "--budget-minutes", "5"], ["run", "--retrain", "--budget-minutes", "5"]),
        (["correct", "item", "B1", "--reask", "--why", "x"], ["correct", "item", "B1", "--reask", "--why", "x"]),
        (["demo"], ["demo"]),
        ([], []),
    ],
)
def test_a_resumed_run_does_not_open_answers_a_second_time(words, goes_on):
    assert resuming(words) == goes_on


def test_options_stand_above_profiles_and_sets():
    config = configure(["demo"], ["settings.env='a'", "settings.price_in=1"], "s", "b", price_in=2.5, price_out=None)
    assert (config.settings.env, config.settings.store, config.settings.price_in) == ("b", "s", 2.5)
    assert config.settings.price_out is None
    assert configure([], ["settings.price_in=1"], None, None, price_in=0.0).settings.price_in == 0


def test_the_scripted_engine_stands_in_for_every_model():
    config = configure(["demo"], [], None, None, "scripted")
    named = {params.model for params in config.stage_params().values() if hasattr(params, "model")}
    assert named == {"scripted"}


def test_an_unknown_stage_is_named_with_the_nearest():
    assert known_stage("caption") == "caption"
    with pytest.raises(UsageError, match="did you mean `caption`"):
        known_stage("captoin")


@pytest.mark.parametrize("words", [[], ["item"], ["itm", "1"], ["item", "1", "user"]])
def test_words_that_are_no_pairs_are_refused_with_what_is_right(words):
    with pytest.raises(UsageError, match="write `this`"):
        pairs(words, ("item", "user"), "`this`")
    assert pairs(["user", "U", "item", "I"], ("item", "user"), "") == {"item": "I", "user": "U"}
