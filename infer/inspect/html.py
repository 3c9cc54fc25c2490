"""A page as one HTML file that needs nothing else: pages/frame.html around its body, with its styles, scripts and data.

The page's script is allowed by its hash and nothing may be loaded, so whatever a note holds is text.
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
    return "\n".join((PAGES / name).read_text("utf-8") for name in names)


def policy(*pages: Sequence[str]) -> str:
    """The content security policy under which the scripts of these pages run, and nothing is loaded."""
    hashes = (base64.b64encode(hashlib.sha256(joined(scripts).encode()).digest()).decode() for scripts in pages)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'"


def build(body: str, styles: Sequence[str], scripts: Sequence[str], title: str, data: Any, under: str = "") -> str:
    """The HTML of a page: pages/frame.html around the page's own `body`. No character of the data can end its block or
    begin a tag. `under`: the content security policy, if not that of its scripts alone."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    parts = {"STYLE": joined(styles), "SCRIPT": joined(scripts), "TITLE": html.escape(title), "DATA": text}
    parts |= {"POLICY": under or policy(scripts), "BODY": filled(body, parts)}
    return filled("frame.html", parts)


def filled(template: str, parts: Mapping[str, str]) -> str:
    fragments = (PAGES / template).read_text("utf-8").split("%%")  # text, name, text, name, …, text
    return "".join(parts[text] if number % 2 else text for number, text in enumerate(fragments))
