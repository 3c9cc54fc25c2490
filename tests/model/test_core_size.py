"""The core stays small enough to be read: config, rotary positions, mask, attention, transformer and cache."""

import io
import tokenize
from pathlib import Path

CORE = ("config", "rotary", "mask", "attention", "transformer", "cache")
ASIDE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """Lines that hold code: not blank, not a comment, not a docstring (a string as a statement)."""
    found: set[int] = set()
    begins = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in ASIDE:
            begins = begins or token.type != tokenize.COMMENT
            continue
        if not (begins and token.type == tokenize.STRING):
            found |= set(range(token.start[0], token.end[0] + 1))
        begins = False
    return len(found)


def test_the_core_has_at_most_600_lines_of_code():
    folder = Path(__file__).parents[2] / "model"
    counts = {name: lines_of_code((folder / f"{name}.py").read_text(encoding="utf-8")) for name in CORE}
    assert sum(counts.values()) <= 600, counts
    assert lines_of_code('"""a\nb"""\n\nx = 1  # c\n# d\ny = """e\nf"""\n') == 3
