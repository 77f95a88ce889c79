"""What the name of a table's file says of it: its format, and the key=value folders it lies in."""

from __future__ import annotations

import os
from urllib.parse import unquote

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".psv": "|", ".ssv": ";"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (*DELIMITERS, *JSON_LINES, ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"  # what engines call the folder of rows without a value


def extension_of(name: str) -> str:
    """The ending that says what a file holds, in lower case, without that of its compression."""
    plain = name.removesuffix(next((end for end in COMPRESSED if name.endswith(end)), ""))
    return os.path.splitext(plain)[1].lower()


def keys_of(name: str) -> dict[str, str | None]:
    """What the key=value folders in the name of a part say."""
    pairs = [folder.partition("=") for folder in name.split("/")[:-1] if "=" in folder]
    return {unquote(key): None if value == NULL_FOLDER else unquote(value) for key, _, value in pairs}
