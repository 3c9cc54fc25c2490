"""Pictures of a page (a report, a trace) in light and dark, on a desktop, on a phone and on paper:

    python -m eval.report.screenshot runs/demo/report.html --out DIR [--at t3]
    python -m eval.report.screenshot runs/tables/report.html --out docs --pictures light dark --height 1250    (the
    README's)

Needs a Chromium on the PATH (Debian: apt-get install chromium). The page is opened from disk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.support import cli as command
from model.support.cli import UserError, nearest

WIDE, PHONE, NARROWEST = 1200, 390, 500  # CSS pixels; Chromium's window is never narrower than the last
PICTURES = ("light", "dark", "phone", "phone-dark", "print")


@dataclass(frozen=True)
class Options:
    """Photograph a page."""

    page: Annotated[Path, tyro.conf.Positional]
    """The HTML file."""
    out: Path
    """Folder for NAME-light.png, NAME-dark.png, NAME-phone.png, NAME-phone-dark.png and NAME-print.pdf."""
    pictures: tuple[Literal["light", "dark", "phone", "phone-dark", "print"], ...] = PICTURES
    """Which of them."""
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
        page = Path(scratch) / options.page.name
        page.write_text(from_place(options.page.read_text(encoding="utf-8"), options.at), encoding="utf-8")
        phone = page.with_name("phone.html")
        phone.write_text(on_phone(page.name, options.height), encoding="utf-8")
        for name in options.pictures:
            out = options.out.resolve() / f"{options.page.stem}-{name}.{'pdf' if name == 'print' else 'png'}"
            if name == "print":
                take(browser, page, out, "--no-pdf-header-footer", f"--print-to-pdf={out}")
                continue
            small = name.startswith("phone")
            scheme = f"--blink-settings=preferredColorScheme={0 if name.endswith('dark') else 1}"
            take(browser, phone if small else page, out, scheme, "--hide-scrollbars",
                 f"--window-size={NARROWEST if small else WIDE},{options.height}", f"--screenshot={out}")  # fmt: skip


def on_phone(page: str, height: int) -> str:
    """A page that shows another one as a phone's screen would, enlarged to the narrowest window that there is."""
    zoom = NARROWEST / PHONE
    return (f'<body style="margin:0"><iframe src="{page}" style="border:0;width:{PHONE}px;height:{height / zoom:.0f}px;'
            f'zoom:{zoom:.4f}"></iframe>')  # fmt: skip


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
