"""Tiny checkpoints of every family, written by transformers' own save_pretrained."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
pytest.importorskip("transformers", reason="needs transformers (the parity extra)")

from their_models import make_theirs  # noqa: E402


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """published(family, **changes) → a folder that transformers wrote."""
    made: dict[str, Path] = {}

    def folder(family: str, **changes) -> Path:
        key = family + repr(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("published") / family
            make_theirs(family, **changes).save_pretrained(made[key])
        return made[key]

    return folder
