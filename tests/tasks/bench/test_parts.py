"""The bare loop asks what the runner asks, no more; and an engine that remembers is asked anew."""

from __future__ import annotations

import asyncio

from mllmsrec_core.ask import Choose, Decoding, Generate, Message, Picture, Reply
from mllmsrec_core.errors import AskError
from mllmsrec_core.stages.score import YES_NO
from storage.store import Store
from tasks.bench.parts import PARTS, Anew, bare, parts
from tasks.bench.rehearsal import Bout
from tasks.engines.scripted import MODEL, ScriptedEngine


class Listening:
    """An engine that notes what it is asked, and how many at once."""

    name, answers = "listening", frozenset({Generate})

    def __init__(self):
        self.heard, self.now, self.most = [], 0, 0

    async def answer(self, ask):
        self.heard.append(ask)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        if ask.messages[0].parts[0] == "bad":
            raise AskError("a bad row")
        return Reply("text")

    async def close(self):
        pass


def question(*parts):
    return Generate(MODEL, (Message("user", parts),), Decoding(9))


def test_each_different_question_is_asked_once_and_in_the_order_of_its_unit():
    first, second, third, bad = map(question, ("one", "two", "three", "bad"))
    engine = Listening()
    bare([[first, second], [second, bad, third], [first]], lambda ask: engine, window=8)
    assert sorted(engine.heard, key=repr) == sorted([first, second, third, bad], key=repr)
    assert [ask for ask in engine.heard if ask in (second, bad, third)] == [second, bad, third]


def test_no_more_units_are_under_way_than_the_window_has():
    engine = Listening()
    bare([[question(str(n))] for n in range(20)], lambda ask: engine, window=3)
    assert engine.most == 3


def test_an_engine_asked_anew_reads_another_word_first_and_the_same_picture():
    engine, picture = Listening(), Picture("0" * 64)
    for word in ("pass 1", "pass 2"):
        asyncio.run(Anew(engine, word).answer(question(picture, "what is it?")))
    assert [ask.messages[0].parts for ask in engine.heard] == [
        (f"({word}) ", picture, "what is it?") for word in ("pass 1", "pass 2")
    ]


def test_what_is_chosen_is_read_and_not_written(blobs, tmp_path):
    asks = [Choose(MODEL, question(str(n)).messages, YES_NO) for n in range(4)]
    bout = Bout(None, None, None, [[(ask, Reply({"logprobs": {"yes": 0.0, "no": 0.0}, "mass": 1.0}))] for ask in asks])  # type: ignore[arg-type]
    engine = ScriptedEngine(blobs)
    found = parts(
        bout, blobs, Store(str(tmp_path / "fresh")), 2.0, lambda units: bare(units, lambda _: engine, 8), None
    )
    assert tuple(found) == PARTS
    assert found["decode"] == 0
    assert found["prefill"] == 2.0 - found["source"] - found["decode of images"] > 1
    assert found["writer"] > 0
