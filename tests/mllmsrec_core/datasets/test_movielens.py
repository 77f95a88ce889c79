"""movielens reads a release as published, posters beside it."""

from pathlib import Path
from zipfile import ZipFile

import pytest

from mllmsrec_core.datasets import movielens
from mllmsrec_core.errors import SourceError
from storage.source import FsspecSource

POSTERS = Path(__file__).parents[4] / "shared" / "data" / "movielens-posters"
MOVIES = 'movieId,title,genres\n1,Up (2009),Adventure|Children\n2,"Odd, The (1999)",(no genres listed)\n'
RATINGS = "userId,movieId,rating,timestamp\n1,1,4.0,1260759108\n1,2,3.5,1260759113\n"


@pytest.fixture
def release(tmp_path):
    (tmp_path / "movies.csv").write_text(MOVIES)
    (tmp_path / "ratings.csv").write_text(RATINGS)
    (tmp_path / "posters").mkdir()
    (tmp_path / "posters" / "1.jpg").write_bytes(b"not read here")
    return tmp_path


def read(folder, **params):
    return movielens.read(FsspecSource(str(folder)), movielens.Params(**params))


def test_genres_become_the_category_and_posters_the_picture(release):
    items = read(release).items
    assert items.select("item_id", "title", "category", "image_uri").rows() == [
        ("1", "Up (2009)", "Adventure, Children", str(release / "posters" / "1.jpg")),
        ("2", "Odd, The (1999)", None, None),
    ]


def test_ratings_from_the_threshold_on_are_liked(release):
    assert read(release).interactions["liked"].to_list() == [True, False]
    assert read(release, liked_from=3.0).interactions["liked"].to_list() == [True, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,1,four,1260759108", "rating `four` is not a number"),
        ("1,1,,1260759108", "rating is empty"),
        ("1,1,nan,1260759108", "rating `nan` is not a number"),
        ("1,1,4.0,yesterday", "timestamp `yesterday` is not a time between 1990 and 2100 in at_unit `s`"),
        ("1,1,4.0,1260759108000", "timestamp `1260759108000` is not a time between 1990 and 2100 in at_unit `s`"),
        ("1,1,4.0,", "timestamp is empty"),
        ("1,1,4.0", "3 fields where the header has 4"),
    ],
)
def test_a_row_whose_rating_or_time_is_none_is_a_reject_with_file_line_and_reason(release, row, reason):
    (release / "ratings.csv").write_text(RATINGS + row + "\n")
    catalogue = read(release)
    assert catalogue.rejects.rows() == [("ratings.csv", 4, reason)]
    assert catalogue.interactions.height == 2


def test_a_release_without_posters_is_whole(release):
    (release / "posters" / "1.jpg").unlink()
    (release / "posters").rmdir()
    assert read(release).items["image_uri"].null_count() == 2


def test_posters_may_lie_in_an_archive_which_has_to_be_there(release):
    with ZipFile(release / "posters.zip", "w") as archive:
        for name in ("posters/2.jpg", "__MACOSX/posters/._2.jpg", "posters/readme.txt"):
            archive.writestr(name, "")
    uris = read(release, posters="posters.zip").items["image_uri"].to_list()
    assert uris == [None, f"zip://posters/2.jpg::{release}/posters.zip"]
    with pytest.raises(SourceError, match=r"there is no .*poster\.zip"):
        read(release, posters="poster.zip")


def test_of_a_folder_of_posters_only_its_own_pictures_are_posters(release):
    (release / "posters" / "backs").mkdir()
    (release / "posters" / "backs" / "2.jpg").write_bytes(b"")
    assert read(release, posters="posters/").items["image_uri"].null_count() == 1


@pytest.mark.parametrize("name", ["movies.csv", "ratings.csv"])
def test_a_missing_file_is_named(release, name):
    (release / name).unlink()
    with pytest.raises(SourceError, match=name):
        read(release)


def test_a_missing_column_is_named_with_the_nearest(release):
    (release / "ratings.csv").write_text(RATINGS.replace("timestamp", "timestamps"))
    with pytest.raises(SourceError, match=r"no column `timestamp` .*did you mean `timestamps`"):
        read(release)


@pytest.mark.skipif(not POSTERS.exists(), reason="the MovieLens release with posters is not beside the repository")
def test_every_row_of_the_real_release_is_read():
    catalogue = read(POSTERS)
    assert catalogue.interactions.height == 100_004
    assert catalogue.interactions["user_id"].n_unique() == 671
    assert catalogue.interactions["item_id"].n_unique() == 9_066
    assert catalogue.items.height == 9_125
    assert catalogue.items["image_uri"].count() == 3_025
    assert catalogue.rejects.is_empty()
