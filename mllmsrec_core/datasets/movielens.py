"""movielens: ratings.csv and movies.csv as GroupLens publishes them, with a folder or archive of posters beside them.

Ratings of `liked_from` and more are liked; the others stay in the history, so that a rating habit can be told. A movie
without a poster is a state, not an error. Knows nothing of stages or prompts.
"""

from __future__ import annotations

import polars as pl
from pydantic import Field

from mllmsrec_core import stage
from mllmsrec_core.datasets import Catalogue, generic
from mllmsrec_core.stage import Source

NO_GENRES = "(no genres listed)"
RATINGS = generic.InteractionColumns(user_id="userId", item_id="movieId", at="timestamp", rating="rating")
MOVIES = generic.ItemColumns(item_id="movieId", title="title", category="genres")


class Params(stage.Params):
    ratings_file: str = Field(default="ratings.csv", description="below the root")
    movies_file: str = Field(default="movies.csv", description="below the root")
    posters: str = Field(default="posters", description="folder or zip archive of <movieId>.jpg")
    liked_from: float = Field(default=4.0, description="ratings from here on are liked")


def read(source: Source | None, params: Params) -> Catalogue:
    """The catalogue of one release. Raises SourceError for a missing file or column."""
    assert source is not None, "the runner opens a source for every dataset that has a path"
    movies, broken = generic.items_in(source, params.movies_file, MOVIES)
    ratings, rejects = generic.interactions_in(source, params.ratings_file, RATINGS, "s", params.liked_from)
    posters = generic.by_item(source, source.names(params.posters), params.posters, (".jpg",))
    items = (
        movies.drop("image_uri")
        .with_columns(pl.col("item_id").str.strip_chars(), category=genres(pl.col("category")))
        .join(posters, on="item_id", how="left", maintain_order="left")
    )
    return Catalogue(items.select(movies.columns), ratings, pl.concat([broken, rejects]))


def genres(column: pl.Expr) -> pl.Expr:
    """`Adventure|Children` as `Adventure, Children`; null where none are listed."""
    return pl.when(column != NO_GENRES).then(column.str.replace_all("|", ", ", literal=True))
