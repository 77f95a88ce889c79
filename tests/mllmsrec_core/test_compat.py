"""The construction of the first code base: each user's most popular items, in the order of time."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core import compat

rows = st.lists(st.tuples(st.sampled_from("uvw"), st.sampled_from("abcdefghij")), min_size=1, max_size=60)


def histories(pairs):
    frame = pl.DataFrame(pairs, schema={"user_id": pl.String, "item_id": pl.String}, orient="row")
    return frame.sort("user_id", maintain_order=True).with_columns(seq=pl.int_range(pl.len()).over("user_id"))


@given(rows)
def test_a_user_keeps_six_rows_and_none_of_them_is_less_popular_than_one_that_is_held_back(pairs):
    frame = histories(pairs).with_columns(popularity=pl.len().over("item_id"))
    marked = frame.with_columns(out=compat.unpopular(frame))
    for _, of in marked.group_by("user_id"):
        kept, held = of.filter(~pl.col("out")), of.filter("out")
        assert kept.height == min(compat.KEPT, of.height)
        if held.height:
            least, seq = min(kept.select("popularity", -pl.col("seq")).rows())
            assert (least, seq) > max(held.select("popularity", -pl.col("seq")).rows())


def test_the_reason_names_the_construction():
    assert compat.LABEL in compat.REASON
