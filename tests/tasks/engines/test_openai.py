"""The openai engine against a small server on loopback that speaks the protocol, well and badly."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from mllmsrec_core.ask import Choose, Decoding, Generate, Message, Model, Picture, Reply
from mllmsrec_core.errors import AskError, ContextTooLong, EmptyReply, EngineError, ImageUnreadable, Passing
from tasks.engines.openai import OpenAIEngine, data_url
from tasks.engines.pictures import decode

MODEL = Model("shop-vlm", "1" * 40)
YES_NO = (("yes", ("yes", "Yes")), ("no", ("no",)))
ASK = Generate(MODEL, (Message("user", ("red?",)),), Decoding(8))
CHOOSE = Choose(MODEL, (Message("user", ("red?",)),), YES_NO)
TOP = {"yes": -0.5, "Yes": -2.0, "no": -1.5, "maybe": -4.0}
CUT = object()  # half a body, then the connection ends
STALL = object()  # nothing, until the client gives up


@dataclass
class Answer:
    """One recorded answer: a status, a body (or CUT, STALL) and headers."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def completion(text: str | None = "A red mug.", logprobs: Any = None, finish: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 5}
    return Answer(200, {"choices": [{**choice, "logprobs": logprobs}], "usage": usage})


def scored(top: dict[str, float]) -> Answer:
    entries = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
    return completion("yes", {"content": [{"token": "yes", "logprob": -0.5, "top_logprobs": entries}]})


def refusal(status: int, message: str, code: Any = None, **headers: str) -> Answer:
    return Answer(status, {"error": {"message": message, "type": "x", "code": code}}, headers)


def cards(*names: str, owner: str = "somebody") -> Answer:
    return Answer(200, {"data": [{"id": name, "owned_by": owner} for name in names]})


class Server:
    """Answers `chat/completions` with what `chat(body, number)` gives, and other paths with `paths`; keeps requests."""

    def __init__(self) -> None:
        self.paths: dict[str, Callable[[dict[str, Any]], Answer]] = {"models": lambda _: cards("shop-vlm")}
        self.chat: Callable[[dict[str, Any], int], Answer] = lambda body, number: completion()
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.most = self.now = 0  # requests under way at once
        self.free = threading.Event()  # ends every stall
        self._lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def bodies(self) -> list[dict[str, Any]]:
        return [body for path, body, _ in self.seen if path == "chat/completions"]

    def stop(self) -> None:
        self.free.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with self._lock:
            self.seen.append((path, body, headers))
            number = len(self.bodies())
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            if path == "chat/completions":
                return self.chat(body, number)
            return self.paths.get(path, lambda _: Answer(404, {"detail": "Not Found"}))(body)
        finally:
            with self._lock:
                self.now -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._respond({})

            def do_POST(self) -> None:
                self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _respond(self, body: dict[str, Any]) -> None:
                answer = server.answer(self.path.removeprefix("/v1/"), body, dict(self.headers))
                if answer.body is STALL:
                    server.free.wait(30)
                    self.close_connection = True
                    return
                content = b"{" if answer.body is CUT else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content) + 100 * (answer.body is CUT)))
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = answer.body is CUT

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def new_server() -> Iterator[Callable[[], Server]]:
    started: list[Server] = []

    def start() -> Server:
        started.append(Server())
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def server(new_server: Any) -> Server:
    return new_server()


@pytest.fixture
def engine(server: Server, blobs: Any) -> Callable[..., OpenAIEngine]:
    how = {"endpoints": [server.url], "retries": 3, "backoff_s": 0.001, "timeout_s": 5.0}
    return lambda **others: OpenAIEngine(blobs, others.pop("locations", {}), **{**how, **others})


def first(bad: Answer, times: int, then: Answer | None = None) -> Callable[[dict[str, Any], int], Answer]:
    return lambda body, number: bad if number <= times else then or completion()


def test_a_text_comes_back_with_its_tokens(engine: Any, server: Server, ask_all: Any) -> None:
    [reply] = ask_all(engine(), [ASK])
    assert (reply.value, reply.tokens_in, reply.tokens_out, reply.engine) == ("A red mug.", 11, 5, "openai")
    [body] = server.bodies()
    assert body == {
        "model": "shop-vlm", "messages": [{"role": "user", "content": "red?"}], "max_tokens": 8, "temperature": 0.0,
    }  # fmt: skip


def test_tokens_a_server_found_in_its_cache_are_counted_where_it_says_so(
    engine: Any, server: Server, ask_all: Any, colours: Any
) -> None:
    asks = [ASK, replace(ASK, messages=(Message("user", ("red?", colours["red"])),)), CHOOSE]
    silent, telling = engine(), engine()
    ask_all(silent, asks[:2])
    assert silent.counters() == {"prompt_tokens": 22, "images": 1}
    said = scored(TOP)
    said.body["usage"]["prompt_tokens_details"] = {"cached_tokens": 8}
    server.chat = lambda body, number: said if "logprobs" in body else completion()
    ask_all(telling, asks)
    assert telling.counters() == {"prompt_tokens": 33, "reused_tokens": 8, "images": 1}


def test_parts_keep_their_order_and_neighbouring_texts_are_one(
    engine: Any, server: Server, ask_all: Any, colours: Any
) -> None:
    parts = ("one ", "two", colours["red"], "three", colours["blue"])
    ask_all(engine(), [replace(ASK, messages=(Message("user", parts),))])
    content = server.bodies()[0]["messages"][0]["content"]
    assert [part.get("text") for part in content] == ["one two", None, "three", None]
    sent = base64.b64decode(content[1]["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(sent)).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("max_pixels", [None, 300])
@pytest.mark.parametrize("turned", [False, True])
def test_a_server_sees_the_pixels_every_engine_sees(form: str, mode: str, max_pixels: int | None, turned: bool) -> None:
    image = Image.effect_noise((40, 20), 90).convert(mode)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    (image.convert("RGB") if form == "JPEG" and mode == "RGBA" else image).save(buffer, form, exif=exif)
    url = data_url(buffer.getvalue(), max_pixels)
    seen = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert seen.mode == "RGB"
    assert seen.tobytes() == decode(buffer.getvalue(), max_pixels).tobytes()


def test_a_row_reads_its_pictures_once_it_has_a_place_and_again_after_a_rest(
    engine: Any, server: Server, blobs: Any, ask_all: Any, colours: Any, monkeypatch: Any
) -> None:
    read: list[str] = []
    monkeypatch.setattr(blobs, "get", lambda sha256, get=blobs.get: read.append(sha256) or get(sha256))
    at: list[int] = []

    def chat(body: Any, number: int) -> Answer:
        at.append(len(read))
        return refusal(500, "oh") if number == 2 else completion()

    server.chat = chat
    shown = (Message("user", ("red?", colours["red"])),)
    asks = [replace(ASK, messages=shown, decoding=Decoding(8 + n)) for n in range(6)]
    assert all(isinstance(reply, Reply) for reply in ask_all(engine(concurrency=1), asks))
    assert at == [1, 2, 3, 4, 5, 6, 7]  # never more than the request under way


def test_a_picture_that_cannot_be_decoded_fails_alone(engine: Any, blobs: Any, ask_all: Any) -> None:
    broken = Picture(blobs.put(b"no picture"))
    bad, good = ask_all(engine(), [replace(ASK, messages=(Message("user", ("red?", broken)),)), ASK])
    assert isinstance(bad, ImageUnreadable) and isinstance(good, Reply)


def test_a_drawn_text_has_a_seed_of_its_own(engine: Any, server: Server, ask_all: Any) -> None:
    draws = [replace(ASK, decoding=Decoding(8, 0.7, 0.9, seed)) for seed in (1, 2, 1)]
    ask_all(engine(concurrency=1), draws)
    seeds = [body["seed"] for body in server.bodies()]
    assert len(set(seeds)) == 2
    assert {(body["temperature"], body["top_p"]) for body in server.bodies()} == {(0.7, 0.9)}


TRANSIENT = [
    refusal(429, "slow down", **{"Retry-After": "0"}),
    refusal(429, "slow down", **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    refusal(429, "slow down"),
    refusal(500, "oh"),
    Answer(503, "starting"),
    Answer(200, CUT),
    Answer(200, {"detail": "no choices here"}),
    Answer(200, "words"),
]


@pytest.mark.parametrize("bad", TRANSIENT, ids=lambda bad: f"{bad.status}")
def test_trouble_that_passes_is_tried_again(bad: Answer, engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(bad, 3)
    [reply] = ask_all(engine(), [ASK])
    assert isinstance(reply, Reply)
    assert len(server.bodies()) == 4


@pytest.mark.parametrize("bad", TRANSIENT, ids=lambda bad: f"{bad.status}")
def test_trouble_that_stays_is_a_passing_failure(bad: Answer, engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(bad, 99)
    [error] = ask_all(engine(), [ASK])
    assert isinstance(error, Passing) and "at try 4" in str(error)
    assert len(server.bodies()) == 4


def test_a_server_that_stalls_is_a_passing_failure(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(Answer(200, STALL), 99)
    [error] = ask_all(engine(timeout_s=0.2, retries=1), [ASK])
    assert isinstance(error, Passing) and "no answer within 0.2 s" in str(error)


def test_a_rest_the_server_wishes_for_is_kept_to(engine: Any, server: Server, ask_all: Any) -> None:
    import time

    at: list[float] = []

    def chat(body: Any, number: int) -> Answer:
        at.append(time.monotonic())
        return refusal(429, "slow down", **{"Retry-After": "0.3"}) if number == 1 else completion()

    server.chat = chat
    replies = ask_all(engine(concurrency=1), [ASK, replace(ASK, decoding=Decoding(9))])
    assert all(isinstance(reply, Reply) for reply in replies)
    assert at[1] - at[0] >= 0.3  # no row asks in between, not only the one that was refused


def test_a_rest_of_hours_is_left_to_the_next_run(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(refusal(429, "tomorrow", **{"Retry-After": "7200"}), 99)
    [error] = ask_all(engine(), [ASK])
    assert isinstance(error, Passing) and "7200 s" in str(error)
    assert len(server.bodies()) == 1


def test_overload_lowers_how_many_are_under_way_and_answers_raise_it_again(
    engine: Any, server: Server, ask_all: Any
) -> None:
    one = engine(concurrency=6, retries=40)
    [endpoint] = one._pool.endpoints
    limits: list[float] = []

    def chat(body: Any, number: int) -> Answer:
        limits.append(endpoint.limit)
        return refusal(503, "too many at once") if number <= 40 else completion()

    server.chat = chat
    asks = [replace(ASK, decoding=Decoding(8 + n)) for n in range(60)]
    assert all(isinstance(reply, Reply) for reply in ask_all(one, asks))
    assert server.most <= 6
    assert (limits[0], min(limits)) == (6.0, 1.0)
    assert 1.0 < endpoint.limit <= 6.0


def test_one_dead_endpoint_of_two_is_made_up_for(engine: Any, server: Server, new_server: Any, ask_all: Any) -> None:
    dead = new_server()
    dead.stop()
    asks = [replace(ASK, decoding=Decoding(8 + n)) for n in range(40)]
    replies = ask_all(engine(endpoints=[dead.url, server.url]), asks)
    assert all(isinstance(reply, Reply) for reply in replies)
    assert len(server.bodies()) == 40


def test_the_load_is_shared(engine: Any, server: Server, new_server: Any, ask_all: Any) -> None:
    other = new_server()
    asks = [replace(ASK, decoding=Decoding(8 + n)) for n in range(40)]
    ask_all(engine(endpoints=[server.url, other.url]), asks)
    assert len(server.bodies()) + len(other.bodies()) == 40
    assert min(len(server.bodies()), len(other.bodies())) >= 8


def test_a_dead_endpoint_is_an_engine_error_with_a_remedy(engine: Any, server: Server, ask_all: Any) -> None:
    server.stop()
    errors = ask_all(engine(), [ASK, CHOOSE])
    assert all(isinstance(error, EngineError) and "Start the server" in str(error) for error in errors)


def test_an_endpoint_that_comes_back_is_used_again(engine: Any, server: Server, ask_all: Any) -> None:
    one = engine(retries=0)
    down = one._pool.endpoints[0]
    down.url, up = "http://127.0.0.1:9/v1", down.url  # the discard port: nobody listens
    [error] = ask_all(one, [ASK], close=False)
    assert isinstance(error, EngineError)
    down.url = up
    server.chat = first(refusal(500, "oh"), 99)
    [error] = ask_all(one, [ASK])
    assert isinstance(error, Passing)  # it answers, if badly: it is not dead any more


@pytest.mark.parametrize(
    "message, code",
    [
        ("This model's maximum context length is 1024 tokens. However, you requested 60 output tokens", 400),
        ("The decoder prompt (length 9012) is longer than the maximum model length of 1024.", 400),
        ("too large", "context_length_exceeded"),
    ],
)
def test_a_prompt_that_is_too_long_fails_alone(
    *, message: str, code: Any, engine: Any, server: Server, ask_all: Any
) -> None:
    server.chat = lambda body, number: refusal(400, message, code) if body["max_tokens"] == 99 else completion()
    bad, good = ask_all(engine(), [replace(ASK, decoding=Decoding(99)), ASK])
    assert isinstance(bad, ContextTooLong) and isinstance(good, Reply)
    assert len(server.bodies()) == 2  # never tried again
    assert server.url in str(bad) and "`--max-model-len`" in str(bad)
    assert "`mllmsrec retry --stage STAGE --class context_too_long`" in str(bad)


def test_other_refusals_fail_their_row(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(refusal(400, "a word I do not like"), 99)
    [error] = ask_all(engine(), [ASK])
    assert type(error) is AskError and "a word I do not like" in str(error)


def test_an_empty_or_withheld_answer_fails_its_row(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(completion(" \n"), 99)
    assert isinstance(ask_all(engine(), [ASK])[0], EmptyReply)
    server.chat = first(completion("", finish="content_filter"), 99)
    [error] = ask_all(engine(), [ASK])
    assert type(error) is AskError and "content_filter" in str(error)


def test_a_text_that_the_server_cut_for_lack_of_room_is_too_long(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(completion(finish="length"), 99)  # 5 tokens
    short, whole = ask_all(engine(), [ASK, replace(ASK, decoding=Decoding(5))])
    assert isinstance(short, ContextTooLong) and "room for only 5" in str(short)
    assert "--max-model-len" in str(short) and "--class context_too_long" in str(short)
    assert isinstance(whole, Reply)


def test_a_choice_is_the_sum_over_its_surface_forms(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = lambda body, number: scored(TOP)
    [reply] = ask_all(engine(), [CHOOSE])
    expected = {"yes": math.log(math.exp(-0.5) + math.exp(-2.0)), "no": -1.5}
    assert reply.value["logprobs"] == pytest.approx(expected)
    assert reply.value["mass"] == pytest.approx(math.exp(-0.5) + math.exp(-2.0) + math.exp(-1.5))
    [body] = server.bodies()
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)


def test_a_form_outside_the_top_tokens_is_a_failed_row_and_never_a_guess(
    engine: Any, server: Server, ask_all: Any
) -> None:
    server.chat = lambda body, number: scored({"yes": -0.1, "no": -3.0} if number == 1 else TOP)
    bad, good = ask_all(engine(concurrency=1), [CHOOSE, replace(CHOOSE, messages=ASK.messages * 2)])
    assert type(bad) is AskError and "'Yes' is not among them" in str(bad) and "top_logprobs" in str(bad)
    assert "the server's setting" in str(bad) and "--max-logprobs" in str(bad)
    assert "`mllmsrec retry --stage STAGE --class ask_failed`" in str(bad)
    assert isinstance(good, Reply)


def test_a_server_without_logprobs_is_an_engine_error_with_a_remedy(engine: Any, server: Server, ask_all: Any) -> None:
    for lacking in (completion("yes"), refusal(400, "logprobs are not available for this model")):
        server.chat = first(lacking, 99)
        [error] = ask_all(engine(), [CHOOSE])
        assert isinstance(error, EngineError) and "log-probabilities" in str(error) and "transformers" in str(error)


def test_an_answer_that_ended_before_its_first_token_fails_its_row(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(completion("", {"content": []}), 99)
    [error] = ask_all(engine(), [CHOOSE])
    assert type(error) is AskError


@pytest.mark.parametrize("floor", [-9999.0, -math.inf])
def test_choices_that_are_all_impossible_to_the_model_fail_their_row(
    floor: float, engine: Any, server: Server, ask_all: Any
) -> None:
    server.chat = lambda body, number: scored(dict.fromkeys(TOP, floor) | {"maybe": -0.1})
    [error] = ask_all(engine(), [CHOOSE])
    assert type(error) is AskError and "no finite probabilities" in str(error) and server.url in str(error)


def odd(**changes: Any) -> Answer:
    answer = completion()
    answer.body["choices"][0] |= {name: one for name, one in changes.items() if name != "usage"}
    answer.body |= {name: one for name, one in changes.items() if name == "usage"}
    return answer


ODD = {
    "parts": odd(message={"role": "assistant", "content": [{"type": "text", "text": "A red mug."}]}),
    "usage": odd(usage="11 tokens"),
    "prompt_tokens": odd(usage={"prompt_tokens": "eleven"}),
    "endless": odd(usage={"prompt_tokens": math.inf}),
    "choice": odd(finish_reason=None, message={"role": "assistant", "content": 5}),
}
ODD_LOGS = {
    "null": {"content": [{"token": "yes", "top_logprobs": [{"token": "yes", "logprob": None}]}]},
    "words": {"content": [{"token": "yes", "top_logprobs": [{"token": "yes", "logprob": "likely"}]}]},
    "no token": {"content": [{"token": "yes", "top_logprobs": [{"logprob": -0.5}]}]},
    "no list": {"content": [{"token": "yes", "top_logprobs": {"yes": -0.5}}]},
    "no steps": {"content": {"yes": -0.5}},
}


@pytest.mark.parametrize("name", [*ODD, *ODD_LOGS])
def test_an_answer_in_another_form_fails_its_row_with_the_name_of_the_endpoint(
    name: str, engine: Any, server: Server, ask_all: Any
) -> None:
    server.chat = first(ODD[name] if name in ODD else completion("yes", ODD_LOGS[name]), 99)
    [error] = ask_all(engine(), [ASK if name in ODD else CHOOSE])
    assert type(error) is AskError
    assert f"{server.url} answers in a form that is not understood" in str(error)
    assert len(server.bodies()) == 1


def test_choices_that_share_a_form_are_an_engine_error(engine: Any, ask_all: Any) -> None:
    [error] = ask_all(engine(), [replace(CHOOSE, choices=(("yes", ("yes",)), ("sure", ("yes", "sure"))))])
    assert isinstance(error, EngineError) and "share a form" in str(error)


def test_vllm_is_asked_for_exactly_the_first_tokens_of_the_forms(
    engine: Any, server: Server, known: Any, ask_all: Any
) -> None:
    base = known("llama")
    server.paths["models"] = lambda _: cards("llama", owner="vllm")
    server.chat = lambda body, number: scored({f"token_id:{i}": -1.0 - i / 1000 for i in body["logprob_token_ids"]})
    [reply] = ask_all(engine(locations={base.model.slug: base.location}), [replace(CHOOSE, model=base.model)])
    from tasks.engines.transformers import TransformersEngine

    theirs = TransformersEngine(engine().blobs, {base.model.slug: base.location})._open(base.model).chat
    forms = theirs.first_tokens(theirs.render(CHOOSE.messages), CHOOSE.choices)
    [body] = server.bodies()
    assert sorted(body["logprob_token_ids"]) == sorted(token for each in forms.values() for token in each)
    assert body["return_tokens_as_token_ids"] and body["repetition_penalty"] == 1.0
    assert reply.value["logprobs"]["no"] == pytest.approx(
        math.log(sum(math.exp(-1 - token / 1000) for token in forms["no"]))
    )


def test_an_adapter_is_asked_for_by_the_name_it_is_served_under(engine: Any, server: Server, ask_all: Any) -> None:
    tuned = replace(ASK, model=replace(MODEL, adapter="ab" * 32))
    ask_all(engine(adapters={"ab" * 32: "mine"}, served_as={"shop-vlm": "other"}, concurrency=1), [tuned, ASK])
    assert [body["model"] for body in server.bodies()] == ["mine", "other"]


def test_vllm_loads_an_adapter_once_from_the_shared_folder(
    *, engine: Any, server: Server, blobs: Any, ask_all: Any, tmp_path: Any
) -> None:
    from tasks.engines.adapters import CONFIG, WEIGHTS, pack

    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    adapter = blobs.put(pack(tmp_path, "shop-vlm"))
    server.paths["models"] = lambda _: cards("shop-vlm", owner="vllm")
    tuned = [replace(ASK, model=replace(MODEL, adapter=adapter), decoding=Decoding(n + 1)) for n in range(6)]
    [error, *_] = ask_all(engine(adapter_folder=str(tmp_path / "seen")), tuned[:1])
    assert isinstance(error, EngineError) and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(error)
    server.paths["load_lora_adapter"] = lambda body: Answer(200, "loaded")
    replies = ask_all(engine(adapter_folder=str(tmp_path / "seen")), tuned)
    assert all(isinstance(reply, Reply) for reply in replies)
    loads = [body for path, body, _ in server.seen if path == "load_lora_adapter"]
    assert len(loads) == 2 and loads[1]["lora_path"] == str(tmp_path / "seen" / adapter)
    assert (tmp_path / "seen" / adapter / WEIGHTS).read_bytes() == b"weights"
    assert {body["model"] for body in server.bodies()} == {f"adapter-{adapter[:12]}"}


def test_an_adapter_folder_that_cannot_be_written_is_an_engine_error_that_names_the_setting(
    *, engine: Any, server: Server, blobs: Any, ask_all: Any, tmp_path: Any
) -> None:
    from tasks.engines.adapters import CONFIG, WEIGHTS, pack

    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    (tmp_path / "file").write_text("in the way")
    server.paths["models"] = lambda _: cards("shop-vlm", owner="vllm")
    tuned = replace(ASK, model=replace(MODEL, adapter=blobs.put(pack(tmp_path, "shop-vlm"))))
    [error] = ask_all(engine(adapter_folder=str(tmp_path / "file")), [tuned])
    assert isinstance(error, EngineError) and "`adapter_folder`" in str(error) and "write" in str(error)


def test_a_name_that_vllm_does_not_serve_is_an_engine_error_that_lists_those_it_does(
    engine: Any, server: Server, ask_all: Any
) -> None:
    server.paths["models"] = lambda _: cards("another", owner="vllm")
    [error] = ask_all(engine(), [ASK])
    assert isinstance(error, EngineError) and "another" in str(error) and "served_as" in str(error)


def test_a_vllm_server_that_was_started_again_is_asked_anew_what_it_serves(
    engine: Any, server: Server, ask_all: Any
) -> None:
    server.paths["models"] = lambda _: cards("shop-vlm", owner="vllm")
    server.chat = first(refusal(404, "The model `shop-vlm` does not exist.", 404), 1)
    [reply] = ask_all(engine(), [ASK])
    assert isinstance(reply, Reply)
    assert [path for path, _, _ in server.seen].count("models") == 2


def test_the_key_travels_in_a_header_and_stands_in_no_error(
    engine: Any, server: Server, ask_all: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-very-secret")
    ask_all(engine(api_key_env="SHOP_KEY"), [ASK])
    assert {headers["Authorization"] for _, _, headers in server.seen} == {"Bearer sk-very-secret"}
    for status in (400, 401, 403, 404, 429, 500):
        server.chat = first(refusal(status, "the key sk-very-secret is no good"), 10**6)
        one = engine(api_key_env="SHOP_KEY")
        [error] = ask_all(one, [ASK])
        assert isinstance(error, Exception)
        assert "sk-very-secret" not in f"{error} {error.__cause__} {vars(one)} {vars(one._pool)}"


def test_a_key_that_is_missing_is_an_engine_error_that_names_its_variable(
    engine: Any, server: Server, ask_all: Any, monkeypatch: Any
) -> None:
    monkeypatch.delenv("SHOP_KEY", raising=False)
    server.paths["models"] = lambda _: refusal(401, "who are you?")
    [error] = ask_all(engine(api_key_env="SHOP_KEY"), [ASK])
    assert isinstance(error, EngineError) and "SHOP_KEY is not set" in str(error)
    assert all("Authorization" not in headers for _, _, headers in server.seen)


def test_a_used_up_quota_is_an_engine_error_at_once(engine: Any, server: Server, ask_all: Any) -> None:
    server.chat = first(refusal(429, "You exceeded your current quota", "insufficient_quota"), 99)
    [error] = ask_all(engine(), [ASK])
    assert isinstance(error, EngineError) and "quota" in str(error)
    assert len(server.bodies()) == 1


@pytest.mark.parametrize(
    "message",
    [
        "shop-vlm is not a multimodal model",
        "This model does not support image input.",
        "The model shop-vlm doesn't support images",
        "image input is not supported - hint: you may need to provide the mmproj",
        "Image inputs are not supported by this model",
        "multimodal inputs not supported",
        "Images are not supported by this model.",
        "At most 0 image(s) may be provided in one prompt.",
    ],
)
def test_a_model_that_reads_no_pictures_is_an_engine_error(
    message: str, engine: Any, server: Server, ask_all: Any, colours: Any
) -> None:
    server.chat = first(refusal(400, message), 99)
    [error] = ask_all(engine(), [replace(ASK, messages=(Message("user", ("red?", colours["red"])),))])
    assert isinstance(error, EngineError) and "reads no pictures" in str(error)


@pytest.mark.parametrize(
    "message",
    [
        "Provided image is not valid.",
        "The image is not a valid JPEG",
        "image_url is not reachable",
        "image is not in a supported format",
        "The server does not support image/webp",
        "This model does not support image format GIF",
        "does not support images larger than 20 MB",
        "Animated images are not supported",
        "At most 10 image(s) may be provided in one prompt.",
    ],
)
def test_a_picture_that_the_server_refuses_fails_its_row_alone(
    message: str, engine: Any, server: Server, ask_all: Any, colours: Any
) -> None:
    server.chat = lambda body, number: refusal(400, message) if body["max_tokens"] == 99 else completion()
    shown = replace(ASK, messages=(Message("user", ("red?", colours["red"])),))
    bad, good = ask_all(engine(), [replace(shown, decoding=Decoding(99)), shown])
    assert type(bad) is AskError and message in str(bad)
    assert isinstance(good, Reply)


def test_a_server_without_a_list_of_models_is_asked_all_the_same(engine: Any, server: Server, ask_all: Any) -> None:
    for listing in (Answer(404, {"detail": "Not Found"}), Answer(200, {"models": []}), Answer(200, [])):
        server.paths["models"] = lambda _, listing=listing: listing
        assert isinstance(ask_all(engine(), [ASK])[0], Reply)


def test_what_cannot_be_asked_is_an_engine_error(engine: Any, ask_all: Any, blobs: Any) -> None:
    from mllmsrec_core.ask import Embed

    for ask, words in (
        (Embed(MODEL, "red"), "generate and choose"),
        (replace(ASK, model=replace(MODEL, revision="")), "revision"),
    ):
        [error] = ask_all(engine(), [ask])
        assert isinstance(error, EngineError) and words in str(error)
    for urls in ([], ["shop"], ["ftp://shop/v1"], ["http://me:secret@shop/v1"], ["http://shop/v1?key=secret"]):
        with pytest.raises(EngineError) as caught:
            OpenAIEngine(blobs, endpoints=urls)
        assert "secret" not in str(caught.value) or "?" in urls[0]
