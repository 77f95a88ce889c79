"""A processor without its weights."""

from typing import Any

import pytest

from mllmsrec_core.errors import EngineError
from tasks.engines.fronts import open_front

YES_NO = (("yes", ("yes", "Yes", " yes", " Yes")), ("no", ("no", "No", " no", " No")))


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_prompts_and_first_tokens_are_those_of_the_transformers_engine(
    name: str, known: Any, blobs: Any, says: Any
) -> None:
    from tasks.engines.transformers import TransformersEngine

    base = known(name)
    locations = {base.model.slug: base.location}
    theirs = TransformersEngine(blobs, locations)._open(base.model)
    chat, positions = open_front(base.model, locations, blobs)
    rendered = chat.render(says("Is the mug red?"))
    assert rendered == theirs.chat.render(says("Is the mug red?"))
    assert chat.ids(rendered) == theirs.chat.ids(rendered)
    assert chat.first_tokens(rendered, YES_NO) == theirs.chat.first_tokens(rendered, YES_NO)
    assert (chat.sees, positions) == (theirs.chat.sees, theirs.positions)


def test_a_folder_without_a_processor_is_an_engine_error(known: Any, blobs: Any, tmp_path: Any) -> None:
    model = known("llama").model
    with pytest.raises(EngineError, match="cannot be loaded"):
        open_front(model, {model.slug: str(tmp_path)}, blobs)
