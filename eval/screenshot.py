"""Pictures of a report in light, dark and at a phone's width: `python -m eval.screenshot RUN_DIR/report.html --out
DIR`.

Needs a Chromium on the PATH (Debian: apt-get install chromium). The page is opened from disk.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from model import command
from model.command import UserError

SHOTS = {"light": (1200, 1500), "dark": (1200, 1500), "phone": (500, 1500)}


@dataclass(frozen=True)
class Options:
    """Photograph a report."""

    page: Annotated[Path, tyro.conf.Positional]
    """The report's HTML file."""
    out: Path
    """Folder for report-light.png, report-dark.png and report-phone.png."""
    at: str = ""
    """A place in the page to show first, for example t2 or ex."""


def main(options: Options) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise UserError("no Chromium on the PATH; on Debian: apt-get install chromium")
    if not options.page.is_file():
        raise UserError(f"{options.page}: no such file; make it with python -m eval.report RUN_DIR")
    options.out.mkdir(parents=True, exist_ok=True)
    address = options.page.resolve().as_uri() + (f"#{options.at}" if options.at else "")
    for name, (width, height) in SHOTS.items():
        shot = options.out.resolve() / f"report-{name}.png"
        with tempfile.TemporaryDirectory() as profile:
            dark = (
                ["--blink-settings=preferredColorScheme=0"]
                if name == "dark"
                else ["--blink-settings=preferredColorScheme=1"]
            )
            done = subprocess.run(
                [
                    browser,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-background-networking",
                    "--hide-scrollbars",
                    f"--user-data-dir={profile}",
                    *dark,
                    f"--window-size={width},{height}",
                    f"--screenshot={shot}",
                    address,
                ],
                capture_output=True,
                timeout=120,
            )
        if done.returncode or not shot.is_file():
            raise UserError(f"{browser} made no picture of {options.page} (exit {done.returncode})")
        print(shot)


if __name__ == "__main__":
    command.run(main, Options)
