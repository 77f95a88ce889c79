"""How many requests an endpoint is given; test_openai.py has the pool over real HTTP."""

import asyncio

import pytest

from mllmsrec_core.errors import EngineError, Passing
from tasks.engines.endpoints import Endpoint, Pool, Trouble

URLS = ("http://one/v1", "http://two/v1/")


def pool(*urls: str) -> Pool:
    return Pool(urls, api_key_env="NO_SUCH_KEY", concurrency=3, timeout_s=1, retries=2, backoff_s=0.001)


def test_one_overload_halves_once_however_many_it_hits() -> None:
    endpoint = Endpoint("http://shop/v1", most=64)
    for _ in range(100):
        endpoint.answered()
    assert endpoint.limit == 64
    for _ in range(30):  # all under way when the first was refused
        endpoint.failed(Trouble("503"), started=1.0, now=2.0, pause_s=0)
    assert endpoint.limit == 32
    for _ in range(32):
        endpoint.answered()
    assert 32.9 < endpoint.limit < 33  # a full round gives one more
    endpoint.failed(Trouble("503"), started=3.0, now=4.0, pause_s=0)
    assert 16 < endpoint.limit < 17


def test_a_dead_endpoint_is_tried_by_one_alone_and_after_those_that_answer() -> None:
    dead, alive = Endpoint("http://one/v1", most=8), Endpoint("http://two/v1", most=8)
    dead.failed(Trouble("gone", refused=True), started=1.0, now=1.0, pause_s=5.0)
    assert not dead.room(5.9) and dead.room(6.1)
    alive.in_flight = 7
    assert min((dead, alive), key=Endpoint.load) is alive
    dead.in_flight = 1
    assert not dead.room(6.1)


def test_refusals_of_requests_sent_together_count_as_one() -> None:
    endpoint = Endpoint("http://one/v1", most=8)
    for _ in range(8):
        endpoint.failed(Trouble("gone", refused=True), started=1.0, now=1.5, pause_s=2.0)
    assert endpoint.refusals == 1
    endpoint.failed(Trouble("gone", refused=True), started=3.6, now=3.7, pause_s=2.0)
    assert endpoint.refusals == 2


@pytest.mark.parametrize("urls", [URLS, URLS[:1]])
def test_no_endpoint_is_ever_given_more_than_its_bound(urls: tuple[str, ...]) -> None:
    one, most = pool(*urls), dict.fromkeys((url.rstrip("/") for url in urls), 0)

    async def attempt(endpoint: Endpoint) -> str:
        most[endpoint.url] = max(most[endpoint.url], endpoint.in_flight)
        await asyncio.sleep(0)
        return endpoint.url

    async def main() -> list[str]:
        return await asyncio.gather(*(one.call(attempt) for _ in range(50)))

    assert set(asyncio.run(main())) == set(most)
    assert set(most.values()) == {3}
    assert all(endpoint.in_flight == 0 for endpoint in one.endpoints)


def test_an_error_or_a_cancelled_row_gives_its_place_back() -> None:
    one = pool(URLS[0])

    async def fails(endpoint: Endpoint) -> None:
        raise ValueError

    async def main() -> None:
        waiting = [asyncio.create_task(one.call(lambda endpoint: asyncio.sleep(60))) for _ in range(9)]
        await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for _ in range(9):
            with pytest.raises(ValueError):
                await asyncio.wait_for(one.call(fails), 5)

    asyncio.run(main())
    assert one.endpoints[0].in_flight == 0


def test_trouble_at_every_try_is_the_rows_and_silence_everywhere_is_everybodys() -> None:
    async def troubled(endpoint: Endpoint) -> None:
        raise Trouble("503 busy")

    async def silent(endpoint: Endpoint) -> None:
        raise Trouble("nobody listens", refused=True)

    with pytest.raises(Passing, match="503 busy, at try 3"):
        asyncio.run(pool(*URLS).call(troubled))
    with pytest.raises(EngineError, match="http://one/v1, http://two/v1: nobody listens"):
        asyncio.run(pool(*URLS).call(silent))


def test_when_nobody_listens_any_more_every_waiting_row_hears_it_at_once() -> None:
    one, tries = Pool(URLS, api_key_env="NO_SUCH_KEY", concurrency=3, timeout_s=1, retries=4, backoff_s=0.02), []

    async def silent(endpoint: Endpoint) -> None:
        tries.append(endpoint)
        raise Trouble("nobody listens", refused=True)

    async def main() -> list[BaseException | None]:
        return await asyncio.gather(*(one.call(silent) for _ in range(500)), return_exceptions=True)

    assert {type(error) for error in asyncio.run(main())} == {EngineError}
    assert len(tries) < 30  # and not one after the other, each with its own rest


def test_rows_that_are_cancelled_while_they_wait_leave_no_lock_behind() -> None:
    async def silent(endpoint: Endpoint) -> None:
        raise Trouble("nobody listens", refused=True)

    async def one_round() -> None:
        pool = Pool(URLS[:1], api_key_env="NO_SUCH_KEY", concurrency=3, timeout_s=1, retries=1, backoff_s=0.002)
        with pytest.raises(BaseExceptionGroup):
            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(pool.call(silent))

    async def main() -> None:
        for _ in range(300):
            await asyncio.wait_for(one_round(), 60)

    asyncio.run(main())


def test_a_server_that_wishes_for_a_long_rest_is_left_to_the_next_run_by_every_row() -> None:
    one = Pool(URLS[:1], api_key_env="NO_SUCH_KEY", concurrency=3, timeout_s=1, retries=2, backoff_s=0.001)

    async def busy(endpoint: Endpoint) -> None:
        raise Trouble("come back tomorrow", wait_s=86_400.0)

    async def main() -> list[BaseException | None]:
        rows = asyncio.gather(*(one.call(busy) for _ in range(20)), return_exceptions=True)
        return await asyncio.wait_for(rows, 60)

    assert {type(error) for error in asyncio.run(main())} == {Passing}
