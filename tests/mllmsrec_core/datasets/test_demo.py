"""Properties of the built-in shop: made from a seed alone, with looks that only pictures show and tastes that drift."""

from __future__ import annotations

import random
from collections import Counter
from io import BytesIO
from itertools import pairwise, product

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mllmsrec_core.datasets import INTERACTIONS, ITEMS, demo

SMALL = demo.Params(items=120, users=40)
LOOKS = [dict(zip(demo.ATTRIBUTES, values, strict=True)) for values in product(*demo.ATTRIBUTES.values())]
looks = st.sampled_from(LOOKS)
preferences = st.fixed_dictionaries({n: st.none() | st.sampled_from(v) for n, v in demo.ATTRIBUTES.items()})


@pytest.fixture(scope="module")
def catalogue() -> demo.Catalogue:
    return demo.read(None, SMALL)


def test_the_same_seed_makes_the_same_shop_and_another_seed_another(catalogue):
    again, other = demo.read(None, SMALL), demo.read(None, SMALL.model_copy(update={"seed": 8}))
    assert catalogue.items.equals(again.items)
    assert catalogue.interactions.equals(again.interactions)
    assert not catalogue.items["image_uri"].equals(other.items["image_uri"])


def test_more_users_leave_the_first_ones_unchanged(catalogue):
    few, more = catalogue.interactions, demo.read(None, SMALL.model_copy(update={"users": 50})).interactions
    assert more.filter(pl.col("user_id").is_in(few["user_id"].implode())).equals(few)


def test_frames_have_the_columns_of_every_catalogue(catalogue):
    assert {**catalogue.items.schema}.items() >= ITEMS.items()
    assert {**catalogue.interactions.schema} == INTERACTIONS
    assert catalogue.items["item_id"].is_unique().all()
    assert catalogue.rejects.is_empty()


def test_looks_stand_in_no_column_but_the_uri_save_a_category_in_few_titles(catalogue):
    assert catalogue.items.select("description", "category", "attributes").null_count().row(0) == (SMALL.items,) * 3
    told = [demo.attributes(title) for title in catalogue.items["title"]]
    assert all(words["colour"] is None and words["pattern"] is None for words in told)
    assert 0.05 < np.mean([words["category"] is not None for words in told]) < 0.4


def test_histories_are_long_enough_rise_in_time_and_lie_days_apart(catalogue):
    lengths = catalogue.interactions.group_by("user_id").len()["len"]
    assert lengths.min() >= 11
    assert lengths.max() <= 20
    gaps = catalogue.interactions.select(pl.col("at").diff().over("user_id")).drop_nulls()["at"]
    assert gaps.min().total_seconds() >= 3600
    assert 3 < gaps.mean().total_seconds() / 86_400 < 10
    assert catalogue.interactions["liked"].all()
    assert catalogue.interactions["rating"].is_null().all()


def test_the_shop_shares_no_id_brand_or_picture_with_what_models_are_trained_on():
    shop, training = demo.assortment(2000, 7), demo.assortment(2000, 7, training=True)
    for value in (lambda item: item.item_id, lambda item: item.title.split()[0], lambda item: item.uri):
        assert not {value(item) for item in shop} & {value(item) for item in training}


def test_a_tenth_of_all_looks_is_kept_from_training_but_sold_in_the_shop():
    held = [look for look in LOOKS if demo.held_out(look)]
    assert 0.08 < len(held) / len(LOOKS) < 0.12
    assert not any(demo.held_out(item.look) for item in demo.assortment(3000, 1, training=True))
    assert any(demo.held_out(item.look) for item in demo.assortment(300, 1))
    for name, values in demo.ATTRIBUTES.items():  # every single word is still learnt
        assert {look[name] for look in LOOKS if not demo.held_out(look)} == set(values)


@given(looks, st.integers(0, 999))
def test_a_picture_is_a_pure_function_of_its_uri(look, number):
    uri = f"demo://{look['category']}/{look['colour']}/{look['pattern']}/7-I{number:04d}.png"
    first = demo.picture(uri)
    random.random()
    assert demo.picture(uri) == first
    assert Image.open(BytesIO(first)).size == (demo.SIZE, demo.SIZE)
    assert demo.truth(uri) == look


def test_pictures_of_the_same_look_differ_in_pose():
    uris = [f"demo://mug/red/plain/7-I{number:04d}.png" for number in range(20)]
    assert len({demo.picture(uri) for uri in uris}) == 20


@pytest.mark.parametrize("uri", ["demo://mug/red/plain/7.jpg", "demo://mug/plain/red/7.png", "file:///mug.png", ""])
def test_a_foreign_uri_is_refused_with_the_wanted_form(uri):
    with pytest.raises(ValueError, match="demo://<category>/<colour>/<pattern>"):
        demo.picture(uri)


def test_tastes_change_in_one_attribute_after_about_one_block_in_seven():
    steps = []
    for _, _, tastes in demo.shoppers(demo.Params(items=50, users=1000)):
        for before, after in pairwise(tastes[:: demo.BLOCK]):
            steps.append(sum(before[name] != after[name] for name in demo.ATTRIBUTES))
    assert max(steps) == 1
    assert np.mean(steps) == pytest.approx(demo.DRIFT, abs=0.02)


def test_the_next_choice_can_be_told_from_a_random_product_but_not_with_certainty():
    params, rng = demo.Params(users=600), random.Random(1)
    products = demo.assortment(params.items, params.seed)
    chosen, others = [], []
    for _, items, tastes in demo.shoppers(params):
        chosen.append(demo.pull(tastes[-1], items[-1].look))
        others += [demo.pull(tastes[-1], item.look) for item in rng.sample(products, 20)]
    pairs = np.array(chosen)[:, None] - np.reshape(others, (len(chosen), -1))
    assert 0.88 <= np.mean((pairs > 0) + 0.5 * (pairs == 0)) <= 0.93


@given(looks, st.sampled_from(["Kovi Modern", "Renlor Urban Lamp"]))
def test_what_is_said_of_a_look_reads_back_as_that_look(look, title):
    assert demo.attributes(demo.caption_text(look)) == look
    assert demo.attributes(demo.summary_text(title, look)) == look
    assert tuple(demo.attributes(" ".join(demo.answers(look))).values()) == tuple(look.values())


@given(preferences)
def test_what_is_said_of_a_preference_reads_back_as_that_preference(preference):
    assert demo.attributes(demo.preference_text(preference)) == preference


@given(preferences, st.lists(looks, min_size=3, max_size=3))
def test_two_of_three_decide_each_attribute_and_else_it_stays(before, block):
    after = demo.update(before, block)
    for name in demo.ATTRIBUTES:
        value, count = Counter(look[name] for look in block).most_common(1)[0]
        assert after[name] == (value if count >= 2 else before[name])


def test_unknown_words_read_as_unknown():
    assert demo.attributes(None) == demo.attributes("A fine mughal thing, reddish.") == demo.NOTHING
