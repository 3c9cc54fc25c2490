"""Pictures of a report in light, dark, at a phone's width and on paper:

    python -m eval.screenshot RUN_DIR/report.html --out DIR [--at t3]

Needs a Chromium on the PATH (Debian: apt-get install chromium). The page is opened from disk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model import command
from model.command import UserError, nearest

WIDTHS = {"light": 1200, "dark": 1200, "phone": 500}


@dataclass(frozen=True)
class Options:
    """Photograph a report."""

    page: Annotated[Path, tyro.conf.Positional]
    """The report's HTML file."""
    out: Path
    """Folder for report-light.png, report-dark.png, report-phone.png and report-print.pdf."""
    at: str = ""
    """The table to begin with, by its id in the page: t1 to t6, canaries, ex, … (empty: the whole page's top)."""
    height: int = 1500
    """Of the pictures, in pixels."""


def main(options: Options) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise UserError("no Chromium on the PATH; on Debian: apt-get install chromium")
    if not options.page.is_file():
        raise UserError(f"{options.page}: no such file; make it with python -m eval.report RUN_DIR")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        page.write_text(from_place(options.page.read_text(encoding="utf-8"), options.at), encoding="utf-8")
        for name, width in WIDTHS.items():
            shot = options.out.resolve() / f"report-{name}.png"
            scheme = f"--blink-settings=preferredColorScheme={0 if name == 'dark' else 1}"
            take(browser, page, shot, scheme, "--hide-scrollbars", f"--window-size={width},{options.height}",
                 f"--screenshot={shot}")  # fmt: skip
        paper = options.out.resolve() / "report-print.pdf"
        take(browser, page, paper, "--no-pdf-header-footer", f"--print-to-pdf={paper}")


def from_place(html: str, at: str) -> str:
    """The page from the heading of that id on. Raises UserError where it has none."""
    if not at:
        return html
    found = re.search(rf'<h2 id="{re.escape(at)}"', html)
    if found is None:
        places = re.findall(r'<h2 id="([^"]+)"', html)
        raise UserError(f"--at {at}: the page has no such place{nearest(at, places)}; it has {', '.join(places)}")
    return html[: html.index("<body>") + len("<body>")] + html[found.start() :]


def take(browser: str, page: Path, out: Path, *how: str) -> None:
    out.unlink(missing_ok=True)
    command_line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                    f"--user-data-dir={page.parent / 'profile'}", *how, page.as_uri()]  # fmt: skip
    done = subprocess.run(command_line, capture_output=True, timeout=120)
    if done.returncode or not out.is_file():
        raise UserError(f"{browser} made no picture {out.name} (exit {done.returncode})")
    print(out)


if __name__ == "__main__":
    command.run(main, Options)
