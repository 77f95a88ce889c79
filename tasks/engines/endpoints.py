"""A pool of HTTP servers: how many requests each is given at once, which failures are tried again, and when.

Each server's share grows while it answers and halves when it is overloaded (429, 5xx, a timeout). Waits between tries
are drawn between nothing and a bound that doubles (full jitter); a server's own Retry-After is kept to. Knows JSON and
status codes, and nothing of models.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from mllmsrec_core.errors import EngineError, Passing

FIRST_LIMIT = 8.0  # requests at once before a server has shown what it takes
LONGEST_WAIT_S = 60.0  # a server that asks for a longer pause is left to the next run
BACKOFF_CAP_S = 30.0
CONNECT_S = 10.0
OVERLOADED = frozenset({408, 409, 425, 429})  # and every 5xx
SHOWN_CHARS = 300  # of a server's message

T = TypeVar("T")


class Trouble(Exception):
    """A try that may succeed the next time. `refused`: nobody listens at the address. `wait_s`: the server's wish."""

    def __init__(self, what: str, *, refused: bool = False, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.refused, self.wait_s = refused, wait_s


class Refused(Exception):
    """An answer that another try would not change: its status, and the server's words with every secret taken out."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(f"{status} {message}")
        self.status, self.message, self.code = status, message, code


class Endpoint:
    """One server and the share of requests it is given."""

    def __init__(self, url: str, most: int) -> None:
        self.url, self.most = url, most
        self.limit = min(FIRST_LIMIT, float(most))
        self.in_flight = 0
        self.resume_at = 0.0  # loop time before which it is left alone
        self.refusals = 0  # in a row
        self._cut_at = -1.0

    def room(self, now: float) -> bool:
        """Whether one more may go there; where nobody listened last time, one alone tries."""
        most = 1 if self.refusals else int(self.limit)
        return self.in_flight < most and self.resume_at <= now

    def load(self) -> tuple[bool, float]:
        """What the pool keeps low: endpoints that answer come first, then those with the largest free share."""
        return self.refusals > 0, self.in_flight / self.limit

    def answered(self) -> None:
        """One more at once for each answer until the first overload, then one more for each full round."""
        self.limit = min(float(self.most), self.limit + (1.0 if self._cut_at < 0 else 1.0 / self.limit))

    def failed(self, trouble: Trouble, started: float, now: float, pause_s: float) -> None:
        """Halve the share, once for all requests that were under way together, and pause as the server wishes."""
        if trouble.refused:
            if started >= self.resume_at or not self.refusals:
                self.refusals += 1
                self.resume_at = now + pause_s
            return
        if started > self._cut_at:
            self.limit, self._cut_at = max(1.0, self.limit / 2), now
        if trouble.wait_s is not None:
            self.resume_at = max(self.resume_at, now + trouble.wait_s)


class Pool:
    """Requests to whichever endpoint has most room.

    At most `concurrency` requests are under way at each endpoint. A failed try is repeated `retries` times. The key,
    from the environment variable `api_key_env`, travels in a header and stands in no error.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key_env: str,
        concurrency: int,
        timeout_s: float,
        retries: int,
        backoff_s: float,
    ) -> None:
        if not urls:
            raise EngineError("no endpoint is named; set `endpoints` to an address such as http://127.0.0.1:8000/v1.")
        self.endpoints = [Endpoint(_checked(url), max(1, concurrency)) for url in urls]
        self.api_key_env, self.key = api_key_env, SecretStr(os.environ.get(api_key_env, "").strip())
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._client: httpx.AsyncClient | None = None
        self._changed = asyncio.Condition()
        self._deaths: list[EngineError] = []  # times at which nobody listened anywhere

    async def call(self, attempt: Callable[[Endpoint], Awaitable[T]]) -> T:
        """What `attempt` gives at some endpoint, tried again after Trouble.

        Raises Passing when the last try failed, and EngineError when nobody listens at any endpoint, each tried as
        often. A try that finds nobody listening is not counted against the row.
        """
        loop, tries, deaths = asyncio.get_running_loop(), 0, len(self._deaths)
        while True:
            endpoint = await self._room(deaths)
            started = loop.time()
            try:
                result = await attempt(endpoint)
                endpoint.answered()
                return result
            except Trouble as trouble:
                wait_s = self._jitter(endpoint.refusals if trouble.refused else tries)
                tries += not trouble.refused
                endpoint.failed(trouble, started, loop.time(), wait_s)
                if error := self._given_up(endpoint, trouble, tries):
                    raise error from trouble
            finally:
                await self._leave(endpoint)
            if not endpoint.refusals:  # else the pool itself keeps away from it for a while
                await asyncio.sleep(wait_s)

    async def send(self, endpoint: Endpoint, method: str, path: str, body: Any = None) -> Any:
        """The JSON that `endpoint` answers with. Raises Trouble or Refused."""
        try:
            answer = await self._open().request(method, f"{endpoint.url}/{path}", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Trouble(f"nobody listens ({self._shown(str(error))})", refused=True) from None
        except httpx.TimeoutException:
            raise Trouble(f"no answer within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise Trouble(f"{type(error).__name__}: {self._shown(str(error))}") from None
        endpoint.refusals = 0
        if answer.is_success:
            return _content(answer)
        raise self._failure(answer)

    async def close(self) -> None:
        """Close every connection."""
        if self._client is not None:
            await self._client.aclose()

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            key = self.key.get_secret_value()
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self._timeout_s, connect=min(CONNECT_S, self._timeout_s)),
                limits=httpx.Limits(max_connections=None),
            )
        return self._client

    async def _room(self, deaths: int) -> Endpoint:
        """The endpoint with the largest free share, once there is one; its place is taken.

        Raises what every row waiting at that time gets, when nobody listened anywhere since `deaths` were counted, and
        Passing where every endpoint rests longer than LONGEST_WAIT_S.
        """
        loop = asyncio.get_running_loop()
        async with self._changed:
            while True:
                if len(self._deaths) > deaths:
                    raise self._deaths[-1]
                now = loop.time()
                free = [endpoint for endpoint in self.endpoints if endpoint.room(now)]
                if free:
                    best = min(free, key=Endpoint.load)
                    best.in_flight += 1
                    return best
                if (rest_s := min(endpoint.resume_at - now for endpoint in self.endpoints)) > LONGEST_WAIT_S:
                    where = ", ".join(endpoint.url for endpoint in self.endpoints)
                    raise Passing(f"{where}: asks for {rest_s:g} s of rest. The next run asks again.")
                paused = [endpoint.resume_at - now for endpoint in self.endpoints if endpoint.resume_at > now]
                # Not `wait_for`: before Python 3.12 it waits in a task of its own, which may keep the lock when cancelled.
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(paused, default=None)):
                        await self._changed.wait()

    async def _leave(self, endpoint: Endpoint) -> None:
        endpoint.in_flight -= 1
        async with self._changed:
            if endpoint.refusals:
                self._changed.notify_all()  # everybody may have to give up
            else:
                self._changed.notify(2)  # an answer frees a place and may open another

    def _jitter(self, times: int) -> float:
        return random.uniform(0, min(BACKOFF_CAP_S, self._backoff_s * 2**times))

    def _given_up(self, endpoint: Endpoint, trouble: Trouble, tries: int) -> Passing | EngineError | None:
        """What to raise instead of another try: the row's failure, or everybody's when nobody listens anywhere."""
        if all(each.refusals > self._retries for each in self.endpoints):
            where = ", ".join(each.url for each in self.endpoints)
            self._deaths.append(
                EngineError(
                    f"{where}: {trouble}. Start the server, or correct `endpoints`, and repeat the command; everything "
                    "answered before is kept."
                )
            )
            return self._deaths[-1]
        wait_s = trouble.wait_s or 0.0
        if tries <= self._retries and wait_s <= LONGEST_WAIT_S:
            return None
        wish = f", which asks for {wait_s:g} s of rest" if wait_s else ""
        return Passing(f"{endpoint.url}{wish}: {trouble}, at try {tries}. The next run asks again.")

    def _failure(self, answer: httpx.Response) -> Trouble | Refused:
        code, message = _complaint(answer)
        message = self._shown(message)
        if answer.status_code == 429 and code == "insufficient_quota":  # no waiting helps
            return Refused(402, message, code)
        if answer.status_code in OVERLOADED or answer.status_code >= 500:
            return Trouble(f"{answer.status_code} {message}", wait_s=_retry_after(answer))
        return Refused(answer.status_code, message, code)

    def _shown(self, text: str) -> str:
        """The beginning of a message on one line, without the key."""
        key = self.key.get_secret_value()
        text = text.replace(key, "***") if key else text
        return re.sub(r"\s+", " ", text)[:SHOWN_CHARS]


def _checked(url: str) -> str:
    """The address without a slash at its end. Raises EngineError for one that is none, or that holds a password."""
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise EngineError(
            "an endpoint's address holds a user or password; name it without, and give the key by `api_key_env`."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise EngineError(f"endpoint {url!r} is no address; give one such as http://127.0.0.1:8000/v1.")
    return url.rstrip("/")


def _content(answer: httpx.Response) -> Any:
    if not answer.content.strip():
        return {}
    try:
        return answer.json()
    except ValueError:  # plain words, from a server; cut JSON, from a broken way
        if answer.headers.get("content-type", "").startswith("text/plain"):
            return {}
        raise Trouble("an answer that is no JSON") from None


def _complaint(answer: httpx.Response) -> tuple[str, str]:
    """The code and the words of an error, as OpenAI, vLLM or anybody else writes them."""
    try:
        content = answer.json()
    except ValueError:
        return "", answer.text
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        return "", str(error)
    return str(error.get("code") or ""), str(error.get("message") or error.get("detail") or json.dumps(error))


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds the server asks to be left alone; it writes seconds or a date."""
    wish = answer.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(wish))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(wish)
    except ValueError:
        return None
    return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
