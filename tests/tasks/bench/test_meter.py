"""Costs are those of the work inside, and sides take turns."""

from __future__ import annotations

from tasks.bench.meter import cores, in_turn, metered


def test_what_is_held_and_computed_inside_is_seen():
    with metered() as nothing:
        pass
    with metered() as much:
        held = bytearray(b"x" * 200_000_000)
        total = sum(range(1_000_000))
    assert held and total
    assert much.memory_mb > nothing.memory_mb + 100
    assert much.cpu > nothing.cpu
    assert much.seconds > 0
    assert cores() >= 1


def test_sides_take_turns_and_the_best_of_each_counts():
    calls, work = [], iter((2_000_000, 10, 2_000_000))

    def one():
        calls.append("one")
        return sum(range(next(work)))

    costs = in_turn({"one": one, "two": lambda: calls.append("two")}, rounds=3)
    assert calls == ["one", "two"] * 3
    cost, made = costs["one"]
    assert made == sum(range(2_000_000)), "what the last round returned"
    with metered() as slow:
        sum(range(2_000_000))
    assert cost.cpu < slow.cpu
