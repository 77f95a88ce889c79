"""Three branches with three behaviours, and hints for misspelt names."""

from __future__ import annotations

import inspect

from mllmsrec_core import errors
from mllmsrec_core.errors import AskError, EngineError, MllmsrecError, Passing, TooManyErrors, nearest

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, MllmsrecError)]


def test_the_tree_in_the_docstring_names_every_error():
    assert errors.__doc__
    assert all(error.__name__ in errors.__doc__ for error in CLASSES)


def test_each_kind_of_failed_row_has_a_class_of_its_own_and_only_trouble_that_passes_is_passing():
    rows = [error for error in CLASSES if issubclass(error, AskError)]
    assert len({error.error_class for error in rows}) == len(rows)
    assert [error for error in rows if error.passing] == [Passing]


def test_an_engine_that_dies_is_no_failed_row():
    assert not issubclass(EngineError, AskError)
    assert not issubclass(TooManyErrors, AskError)


def test_a_misspelt_name_gets_the_closest_known_one_else_all_of_them():
    assert nearest("captoin", ["score", "caption"]) == "did you mean `caption`?"
    assert nearest("zzz", ["score", "caption"]) == "known: caption, score"
