"""A page as one HTML file that needs nothing else: a template of pages/, its styles, its scripts and its data.

The page's script is allowed by its hash and nothing may be loaded, so whatever a note holds is text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "pages"


def joined(names: Sequence[str]) -> str:
    return "\n".join((PAGES / name).read_text("utf-8") for name in names)


def script_hash(scripts: Sequence[str]) -> str:
    """The scripts as a content security policy names them."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(joined(scripts).encode()).digest()).decode()}'"


def build(template: str, styles: Sequence[str], scripts: Sequence[str], title: str, data: Any, **more: str) -> str:
    """The HTML of a page. No character of the data can end its block or begin a tag. `more`: further places of the
    template with their HTML."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    parts = {
        "HASH": script_hash(scripts),
        "STYLE": joined(styles),
        "SCRIPT": joined(scripts),
        "TITLE": html.escape(title),
        "DATA": text,
        **more,
    }
    fragments = (PAGES / template).read_text("utf-8").split("%%")  # text, name, text, name, …, text
    return "".join(parts[text] if number % 2 else text for number, text in enumerate(fragments))
