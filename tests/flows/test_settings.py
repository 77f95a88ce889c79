"""Layers of configuration, and errors that name the wrong key and the nearest right one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.settings import load, read_profile, stages_with_model
from mllmsrec_core.errors import UsageError
from tasks.config import Config, Pipeline, Settings


@pytest.fixture
def profile(tmp_path):
    """`profile("[caption]\\nmax_tokens = 5")`: the path of a profile with this content."""

    def write(text: str, name: str = "mine") -> str:
        (tmp_path / f"{name}.toml").write_text(text, "utf-8")
        return str(tmp_path / f"{name}.toml")

    return write


def max_tokens(*layers, **more) -> int:
    return load(*layers, **more).params.caption.max_tokens


def test_without_layers_there_are_defaults():
    assert load([], [], {}) == Config(Settings(), Pipeline())


def test_each_layer_stands_over_the_one_before_it(profile):
    one, two = profile("[caption]\nmax_tokens = 1"), profile("[caption]\nmax_tokens = 2", "two")
    environ, sets = {"MLLMSREC_CAPTION__MAX_TOKENS": "3"}, ["caption.max_tokens=4"]
    assert max_tokens([], [], {}) == 200
    assert max_tokens([one], [], {}) == 1
    assert max_tokens([one, two], [], {}) == 2
    assert max_tokens([two, one], [], {}) == 1
    assert max_tokens([one, two], [], environ) == 3
    assert max_tokens([one, two], sets, environ) == 4
    assert max_tokens([one, two], ["caption.max_tokens=5", *sets], environ) == 4


def test_a_later_profile_changes_only_what_it_names(profile):
    one = profile('model = "a"\n[caption]\nmax_tokens = 1\nprompt = "P"\n[ingest.demo]\nitems = 5')
    two = profile("[caption]\nmax_tokens = 2\n[ingest.demo]\nusers = 6", "two")
    params = load([one, two], [], {}).params
    assert (params.model, params.caption.prompt, params.caption.max_tokens) == ("a", "P", 2)
    assert (params.ingest.demo.items, params.ingest.demo.users) == (5, 6)


def test_settings_come_from_short_and_long_names_in_the_environment():
    environ = {
        "MLLMSREC_STORE": "s3://shop",
        "MLLMSREC_SETTINGS__WINDOW": "7",
        "MLLMSREC_MODEL": "scripted",
        "PATH": "/bin",
    }
    config = load([], [], environ)
    assert (config.settings.store, config.settings.window, config.params.model) == ("s3://shop", 7, "scripted")


def test_a_value_can_be_read_from_a_file(tmp_path):
    (tmp_path / "new.md").write_text("Beschreibe das = {Bild}.\nKurz.\n", "utf-8")
    config = load([], [f"caption.prompt=file:{tmp_path / 'new.md'}"], {})
    assert config.params.caption.prompt == "Beschreibe das = {Bild}.\nKurz."
    with pytest.raises(UsageError, match=r"there is no file .*gone\.md"):
        load([], [f"caption.prompt=file:{tmp_path / 'gone.md'}"], {})


@pytest.mark.parametrize(
    ("text", "value"),
    [("Say = what", "Say = what"), ('"quoted"', "quoted"), ("no quotes", "no quotes"), ("a.b", "a.b"), ("[x", "[x")],
)
def test_text_needs_no_quotes(text, value):
    assert load([], [f"caption.prompt={text}"], {}).params.caption.prompt == value


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("captoin.max_tokens", r"unknown key `captoin`; did you mean `caption`\?"),
        ("caption.max_token", r"unknown key `caption\.max_token`; did you mean `max_tokens`\?"),
        ("ingest.demo.item", r"unknown key `ingest\.demo\.item`; did you mean `items`\?"),
        ("settings.windw", r"unknown key `settings\.windw`; did you mean `window`\?"),
        ("setings.window", r"unknown key `setings`; did you mean `settings`\?"),
        ("caption.zzz", r"unknown key `caption\.zzz`; known: .*max_tokens"),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest(key, said):
    with pytest.raises(UsageError, match=said):
        load([], [f"{key}=1"], {})


def test_an_unknown_key_in_the_environment_is_an_error_too():
    with pytest.raises(UsageError, match=r"unknown key `caption.promt`; did you mean `prompt`"):
        load([], [], {"MLLMSREC_CAPTION__PROMT": "x"})


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("caption.max_tokens=many", "`caption.max_tokens` = 'many'.*integer"),
        ("caption.max_tokens=0", "`caption.max_tokens` = 0.*greater than or equal to 1"),
        ("settings.window=0", "`settings.window` = 0"),
        ("caption=5", "`caption` = 5"),
        ("preference.mode=recurent", "`preference.mode` = 'recurent'.*'recurrent'"),
        ("score.prompt={usr}", r"`score.prompt`.*\{usr\}.*\{user\} and \{item\}"),
        ("caption.max_tokens.x=1", r"caption\.max_tokens.*"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(sets, said):
    with pytest.raises(UsageError, match=said):
        load([], [sets], {})


def test_every_mistake_is_named_at_once():
    with pytest.raises(UsageError, match=r"caption.max_token.*summary.max_token"):
        load([], ["caption.max_token=1", "summary.max_token=1"], {})


def test_a_set_without_a_value_shows_how_it_is_written():
    with pytest.raises(UsageError, match=r"--set caption.max_tokens: write it as key=value"):
        load([], ["caption.max_tokens"], {})


def test_a_value_below_a_value_is_an_error(profile):
    with pytest.raises(UsageError, match="`model` is a value, not a table"):
        load([], ["model=a", "model.b=1"], {})


def test_a_missing_profile_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="no profile `dmo`; did you mean `demo`"):
        load(["dmo"], [], {})
    with pytest.raises(UsageError, match=r"no profile `\./gone\.toml`"):
        load(["./gone.toml"], [], {})


def test_a_profile_that_is_no_toml_is_named(profile):
    with pytest.raises(UsageError, match=r"mine\.toml is not valid TOML"):
        load([profile("caption = [")], [], {})


@pytest.mark.parametrize("name", ["demo", "generic", "movielens"])
def test_every_profile_that_ships_is_valid(name):
    assert read_profile(name)
    load([name], ["ingest.path=x"], {})


def test_a_configuration_travels_as_json(profile):
    config = load(["demo"], ["caption.prompt=«{x}»", "settings.allow_hosts=['a','b']"], {})
    assert Config.from_json(config.to_json()) == config


def test_stages_that_name_a_model_are_those_that_ask_one():
    assert set(stages_with_model()) == {"caption", "summary", "preference", "sft", "score", "audit"}


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30))
def test_any_text_in_a_profile_survives(text):
    config = Config(Settings(), Pipeline.model_validate({"caption": {"prompt": text}}))
    assert Config.from_json(config.to_json()).params.caption.prompt == text
