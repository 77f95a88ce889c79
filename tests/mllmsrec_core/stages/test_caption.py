"""One question per distinct picture."""

from __future__ import annotations

import polars as pl
import pytest

from mllmsrec_core.ask import Model, Picture, Reply, key
from mllmsrec_core.stage import Inputs
from mllmsrec_core.stages import caption
from mllmsrec_core.stages.caption import Params

IMAGES = pl.DataFrame(
    {
        "item_id": ["1", "2", "3", "4", "5"],
        "sha256": ["bb", "aa", "bb", None, "cc"],
        "status": ["ok", "ok", "ok", "missing", "refused"],
    }
)


def asked(params: Params, reply: Reply):
    """The question about one picture, and the row made of the reply."""
    chain = caption.ask(Inputs({}, {"caption": params}, Model("scripted", "1")), {"sha256": "aa"})
    question = next(chain)
    with pytest.raises(StopIteration) as end:
        chain.send(reply)
    (row,) = end.value.value
    return question, row


def test_a_picture_that_items_share_is_described_once_and_one_that_is_missing_not_at_all():
    assert caption.rows(Inputs({"images": IMAGES}, {}))["sha256"].to_list() == ["aa", "bb"]


def test_an_answer_becomes_a_caption_that_names_its_question():
    question, row = asked(Params(), Reply(" A red\nmug.<|im_end|> "))
    assert row == {"sha256": "aa", "caption": "A red mug.", "ask": key(question), "error": None}


def test_a_failure_becomes_a_row_without_a_caption():
    _, row = asked(Params(), Reply(error="empty_reply"))
    assert (row["caption"], row["error"]) == (None, "empty_reply")


def test_an_edited_prompt_stands_in_the_question_as_it_is_written():
    question, _ = asked(Params(prompt="Was ist {das}?", max_tokens=7), Reply("x"))
    assert question.messages[0].parts == ("Was ist {das}?", Picture("aa"))
    assert question.decoding.max_tokens == 7


def test_the_rendered_prompt_is_what_models_were_trained_on(golden):
    golden("caption", caption.prompt(Params(), "ab" * 32))
