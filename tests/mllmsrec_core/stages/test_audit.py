"""Claims against pictures: grounded, unsupported or not visual, and cheap."""

from math import comb

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmsrec_core.ask import Embed, Picture, Reply, key
from mllmsrec_core.metrics import pooled_auc
from mllmsrec_core.stages import audit

COLOURS = ("red", "blue", "green", "black")


def vector(ask: Embed) -> Reply:
    """A perfect CLIP for colours: pictures are of colour number mod 4, with a little of their own."""
    axis = np.zeros(60)
    if isinstance(ask.content, Picture):
        number = int(ask.content.sha256[3:])
        axis[number % 4], axis[5 + number] = 1, 0.01
    else:
        axis[[n for n, colour in enumerate(COLOURS) if colour in ask.content] or [4]] = 1
    return Reply((axis / np.linalg.norm(axis)).tolist())


def wrong(shop):
    """The same shop with the caption of sha5 saying another colour than its picture shows."""
    said = pl.when(pl.col("sha256") == "sha5").then(pl.lit("A black mug.")).otherwise("caption")
    return shop.having(captions=shop.inputs["captions"].with_columns(caption=said))


@pytest.fixture(scope="module")
def found(shop):
    return wrong(shop).set("audit", null_images=30).run("audit", vector)["audit"]


def test_a_text_is_cut_into_sentences_and_their_phrases():
    assert audit.claims("A red mug with a white dot, and a handle. It is plain!") == [
        "A red mug with a white dot, and a handle",
        "A red mug",
        "a white dot",
        "a handle",
        "It is plain",
    ]
    assert audit.claims("A red mug.") == ["A red mug"]
    assert audit.claims("A sandy shore") == ["A sandy shore"]  # "and" inside a word cuts nothing


@given(st.text(max_size=200))
def test_claims_are_distinct_not_empty_and_the_texts_own(text):
    claims = audit.claims(text)
    assert len(set(claims)) == len(claims)
    assert all(claim and claim in audit.clean(text) for claim in claims)


def test_every_subject_with_a_text_has_its_claims(shop, found):
    assert set(found.filter(pl.col("subject") == "caption")["subject_id"]) == set(shop.inputs["captions"]["sha256"])
    shown = shop.inputs["images"].filter(pl.col("status") == "ok")["item_id"]
    described = shop.inputs["item_summaries"]["item_id"]
    assert set(found.filter(pl.col("subject") == "summary")["subject_id"]) == set(shown) & set(described)


def test_a_wrong_colour_is_unsupported_and_right_ones_are_grounded(found):
    captions = found.filter(pl.col("subject") == "caption")
    assert captions.filter(pl.col("subject_id") == "sha5").select("claim", "verdict").rows() == [
        ("A black mug", "unsupported")
    ]
    others = captions.filter(pl.col("subject_id") != "sha5")
    assert (others["verdict"] == "grounded").mean() > 0.9


def test_words_taken_from_the_title_are_not_visual_and_not_asked(shop):
    title = shop.inputs["item_summaries"].with_columns(summary=pl.format("Brand{}", pl.col("item_id").str.slice(1)))
    titled = shop.having(item_summaries=title.with_columns(pl.lit("A Brand thing, kitchen, office.").alias("summary")))
    items = titled.inputs["items"].with_columns(title=pl.lit("Brand thing"))
    rows = titled.having(items=items).run("audit", vector)["audit"].filter(pl.col("subject") == "summary")
    verdicts = dict(rows.select("claim", "verdict").filter(pl.col("claim") == "A Brand thing").rows())
    assert verdicts == {"A Brand thing": "not_visual"}
    assert rows.filter(pl.col("verdict") == "not_visual")["ask"].null_count() > 0


@pytest.mark.parametrize(
    ("claim", "quoted", "seen", "visual"),
    [
        ("a red mug", None, "a red mug", True),
        ("Acme deluxe", "Acme Deluxe", "a red mug", False),
        ("Acme mug", "Acme mug", "a red mug", True),  # the caption says so too: the picture can be asked
        ("Acme red", "Acme mug", "a blue lamp", True),
        ("it is", "anything", None, False),
    ],
)
def test_a_claim_is_visual_unless_all_its_words_are_the_items_own(claim, quoted, seen, visual):
    assert audit.visual(claim, quoted, seen) is visual


def test_a_claim_too_long_for_clip_is_a_row_with_its_error_and_is_never_cut(shop):
    long = " ".join(f"word{n}" for n in range(46))
    told = shop.having(captions=pl.DataFrame({"sha256": ["sha2"], "caption": [long]}))
    (row,) = told.run("audit", vector)["audit"].filter(pl.col("subject") == "caption").rows(named=True)
    assert (row["error"], row["claim"], row["verdict"]) == ("context_too_long", long, None)

    def refuses(ask: Embed) -> Reply:
        return Reply(error="context_too_long") if ask.content == "A red mug" else vector(ask)

    rows = shop.run("audit", refuses)["audit"].filter(pl.col("claim") == "A red mug")
    assert set(rows["error"]) == {"context_too_long"}
    assert rows["ask"].null_count() == rows["similarity"].count() == 0


def test_a_picture_that_cannot_be_read_leaves_its_claims_without_a_verdict(shop):
    def unreadable(ask: Embed) -> Reply:
        return Reply(error="image_unreadable") if ask.content == Picture("sha5") else vector(ask)

    rows = shop.run("audit", unreadable)["audit"].filter(pl.col("subject") == "caption")
    assert rows.filter(pl.col("subject_id") == "sha5").select("verdict", "error").rows() == [(None, "image_unreadable")]
    assert rows.filter(pl.col("subject_id") != "sha5")["error"].null_count() == len(rows) - 1


def test_a_single_picture_has_nothing_to_be_compared_with(shop):
    alone = shop.having(images=shop.inputs["images"].filter(pl.col("sha256") == "sha5"))
    rows = alone.run("audit", vector)["audit"].filter(pl.col("subject") == "caption")
    assert rows["similarity"].count() == 1
    assert rows["verdict"].null_count() == 1
    nothing = shop.having(images=shop.inputs["images"].clear())
    assert nothing.run("audit", vector)["audit"].is_empty()


def test_every_null_holds_other_pictures_and_a_new_picture_enters_few(shop):
    rows = audit.rows(shop.inputs)
    assert all(len(set(null)) == 16 and sha not in null for sha, null in rows.select("sha256", "null").rows())
    new = pl.DataFrame({"item_id": ["new"], "sha256": ["sha99"], "status": ["ok"]})
    more = audit.rows(shop.having(images=pl.concat([shop.inputs["images"], new])).inputs)
    before, after = (dict(of.select("sha256", pl.col("null").list.sort()).rows()) for of in (rows, more))
    assert sum(before[sha] != after[sha] for sha in before) <= 16


def test_distinct_questions_are_as_few_as_pictures_and_claims(shop):
    before = len(shop.asked)
    rows = shop.run("audit", vector)["audit"]
    asked = {key(ask) for ask in shop.asked[before:]}
    assert len(asked) <= audit.rows(shop.inputs)["sha256"].n_unique() + len(rows)


@given(st.floats(-1, 1), st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_the_quantile_lies_between_none_and_all_and_mirrors(similarity, null):
    place = audit.quantile(similarity, null)
    assert 0 <= place <= 1
    assert audit.quantile(-similarity, [-other for other in null]) == pytest.approx(1 - place)
    assert audit.quantile(similarity, [similarity] * 3) == 0.5


@pytest.mark.parametrize(("threshold", "true", "false"), [(0.85, 0.89, 0.07), (0.9, 0.73, 0.03)])
def test_the_default_threshold_passes_what_its_comment_says(threshold, true, false):
    """A claim true of one picture in eight, a perfect CLIP, 16 others: how many true and false claims pass."""
    n, share, above = 16, 1 / 8, int(16 * (1 - threshold) + 1e-9)
    chance = [comb(n, m) * share**m * (1 - share) ** (n - m) for m in range(n + 1)]
    passes_true = sum(p * min(1, (above + 1) / (m + 1)) for m, p in enumerate(chance))
    passes_false = sum(p * max(0, above - m + 1) / (n - m + 1) for m, p in enumerate(chance))
    assert passes_true == pytest.approx(true, abs=0.01)
    assert passes_false == pytest.approx(false, abs=0.01)


def test_planted_swaps_replace_one_word_of_a_group_by_another():
    assert audit.swapped("A tall lamp", COLOURS) is None
    assert audit.swapped("A red mug", ("red",)) is None
    swap = audit.swapped("A Red mug, not blue", COLOURS)
    assert swap in {f"A {colour} mug, not blue" for colour in COLOURS[1:]}
    assert audit.swapped("A Red mug, not blue", COLOURS) == swap


def test_planted_swaps_are_told_from_true_claims(shop, found):
    true = found.filter(pl.col("subject") == "caption", pl.col("subject_id") != "sha5")
    captions = shop.inputs["captions"].with_columns(
        caption=pl.col("caption").map_elements(lambda text: audit.swapped(text, COLOURS), pl.String)
    )
    swapped = shop.having(captions=captions).run("audit", vector)["audit"].filter(pl.col("subject") == "caption")
    quantiles = np.concatenate([true["quantile"], swapped["quantile"]])
    assert pooled_auc(np.arange(len(quantiles)) < len(true), quantiles) > 0.95
