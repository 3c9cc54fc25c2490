"""Builds self-contained HTML pages: pages/frame.html around a body, with inlined styles, scripts and data.

The content security policy allows the page's own script by its hash and nothing else, so that no text of a note can run
or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "pages"


def joined(names: Sequence[str]) -> str:
    """The contents of files in pages/, concatenated."""
    return "\n".join((PAGES / name).read_text("utf-8") for name in names)


def policy(*pages: Sequence[str]) -> str:
    """The content security policy that allows the scripts of the given pages and loads nothing."""
    hashes = (base64.b64encode(hashlib.sha256(joined(scripts).encode()).digest()).decode() for scripts in pages)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'"


def build(body: str, styles: Sequence[str], scripts: Sequence[str], title: str, data: Any, csp: str = "") -> str:
    """The HTML of a page with the given `body` (a file of pages/). The data is escaped so that it cannot end its block.
    `csp` is the content security policy, by default that of the page's scripts."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    parts = {"STYLE": joined(styles), "SCRIPT": joined(scripts), "TITLE": html.escape(title), "DATA": text}
    parts |= {"POLICY": csp or policy(scripts), "BODY": filled(body, parts)}
    return filled("frame.html", parts)


def filled(template: str, parts: Mapping[str, str]) -> str:
    """A file of pages/ with each %%NAME%% replaced by its part."""
    fragments = (PAGES / template).read_text("utf-8").split("%%")  # text, name, text, name, …, text
    return "".join(parts[text] if number % 2 else text for number, text in enumerate(fragments))
