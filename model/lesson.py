"""A lesson told step by step: in the terminal, or as one HTML page with the same content.

A step says what happens, shows the line of code that does it (found in the live source, so that it cannot go stale),
real shapes and numbers, what the step costs for one token, and one number worked by hand beside the program's own.
The tours of the rooms (`python -m model.tour`, `lora.tour`, `train.tour`) are lists of steps.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.support.files import write_text

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Source:
    """A line of code: its file (from the repository's root), its number, its text."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Hand:
    """A number worked out from other numbers shown, beside the program's. `slack` is what rounding may make of it."""

    how: str
    value: float
    program: float
    slack: float

    @property
    def ok(self) -> bool:
        return abs(self.value - self.program) <= self.slack

    def __str__(self) -> str:
        verdict = "the program says" if self.ok else "NOT what the program says:"
        return f"{self.how} = {self.value:.6g}; {verdict} {self.program:.6g}"


@dataclass(frozen=True)
class Step:
    title: str
    says: str
    code: Source
    facts: Sequence[tuple[str, str]] = ()
    hand: Sequence[Hand] = ()
    cost: tuple[int, int] | None = None  # (FLOPs, bytes read) for one token
    table: Sequence[Sequence[str]] = ()  # the first row is the head


def source(function: Callable[..., Any], fragment: str) -> Source:
    """The one line of a function that holds `fragment`."""
    lines, start = inspect.getsourcelines(function)
    found = [n for n, line in enumerate(lines) if fragment in line]
    assert len(found) == 1, f"{function.__qualname__}: {len(found)} lines hold {fragment!r}"
    file = inspect.getsourcefile(function)
    assert file is not None
    path = Path(file).resolve()
    inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return Source(str(inside), start + found[0], lines[found[0]].strip())


def dot(how: str, a: Tensor, b: Tensor, program: Tensor | float, plus: float = 0.0) -> Hand:
    """Σ a·b + plus in fp64 beside the program's number; the slack is the rounding of so many terms in fp32."""
    terms = a.double().flatten() * b.double().flatten()
    bound = (len(terms) + 8) * torch.finfo(torch.float32).eps * (float(terms.abs().sum()) + abs(plus))
    return Hand(how, float(terms.sum()) + plus, float(program), bound)


def near(how: str, value: float, program: Tensor | float, scale: float | None = None) -> Hand:
    """A number that a few fp32 operations make; `scale` is the largest number on the way (default: its own size)."""
    size = abs(value) if scale is None else scale
    return Hand(how, value, float(program), 32 * torch.finfo(torch.float32).eps * size)


def shape(x: Tensor) -> str:
    return " × ".join(map(str, x.shape))


def numbers(x_N: Tensor, count: int = 4) -> str:
    """The first few numbers of a vector."""
    more = " …" if x_N.numel() > count else ""
    return "  ".join(f"{float(value):+.4f}" for value in x_N.flatten()[:count]) + more


def amount(value: float, unit: str) -> str:
    """1234567 → 1.23 M, with its unit."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def cost(step: Step) -> str:
    assert step.cost is not None
    return f"{amount(step.cost[0], 'FLOP')}, {amount(step.cost[1], 'B')} read"


def tell(title: str, opening: str, steps: Iterable[Step], html: str | None) -> int:
    """Print the lesson, or write it to `html`. Returns 1 where a number worked by hand is not the program's, else 0."""
    steps = list(steps)
    if html is None:
        print(in_terminal(title, opening, steps))
    else:
        write_text(html, as_page(title, opening, steps), mode=0o600)
        print(f"{html} (readable by its owner only: it holds the text that was read)", file=sys.stderr)
    wrong = [(step.title, hand) for step in steps for hand in step.hand if not hand.ok]
    for name, hand in wrong:
        print(f"{name}: {hand}", file=sys.stderr)
    return 1 if wrong else 0


def in_terminal(title: str, opening: str, steps: Sequence[Step]) -> str:
    width = min(100, max(50, shutil.get_terminal_size().columns))
    styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    bold, dim, off = ("\x1b[1m", "\x1b[2m", "\x1b[0m") if styled else ("", "", "")

    def wrapped(text: str, indent: str = "    ", hanging: str | None = None) -> str:
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=hanging or indent,
                             break_on_hyphens=False)  # fmt: skip

    out = [f"{bold}{title}{off}", wrapped(opening, ""), ""]
    for number, step in enumerate(steps, start=1):
        out += [f"{bold}{number:2}  {step.title}{off}", wrapped(step.says)]
        out += [f"    {dim}{step.code.file}:{step.code.line}{off}", f"      {step.code.text}"]
        pairs = [*step.facts, *(("by hand", str(hand)) for hand in step.hand)]
        pairs += [("one token", cost(step))] if step.cost else []
        room = max((len(name) for name, _ in pairs), default=0)
        out += [wrapped(f"{name:<{room}}  {value}", "    ", " " * (room + 6)) for name, value in pairs]
        if step.table:
            wide = [max(len(row[i]) for row in step.table) for i in range(len(step.table[0]))]
            lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, wide, strict=True)) for row in step.table]
            out += ["", *(f"    {line}".rstrip() for line in lines)]
        out.append("")
    return "\n".join(out).rstrip()


STYLE = """
:root { --ink:#1b1f24; --page:#fff; --soft:#5c6672; --line:#d9dee4; --band:#f5f7f9; --link:#1d5f96 }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e4e8ec; --page:#14171a; --soft:#9aa5b1; --line:#343a41; --band:#1c2125; --link:#7db9e8 } }
* { box-sizing:border-box }
body { margin:0 auto; max-width:52rem; padding:1rem; background:var(--page); color:var(--ink);
  font:16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size:1.5rem; line-height:1.2 } h2 { font-size:1.1rem; margin:2rem 0 .3rem; border-top:1px solid var(--line);
  padding-top:1rem } p { margin:.4rem 0; overflow-wrap:anywhere }
pre { background:var(--band); border:1px solid var(--line); border-radius:6px; padding:.6rem; font-size:.85rem;
  margin:.5rem 0; white-space:pre-wrap; overflow-wrap:anywhere } .where { color:var(--link) }
dl { display:grid; grid-template-columns:minmax(6rem, max-content) 1fr; gap:.15rem .9rem; margin:.5rem 0 }
dt { color:var(--soft) }
dd { margin:0; overflow-wrap:anywhere; white-space:pre-wrap; font-variant-numeric:tabular-nums }
.wrong { font-weight:700; text-decoration:underline wavy } .wide { overflow-x:auto }
table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums }
th, td { text-align:left; padding:.25rem .7rem; border-bottom:1px solid var(--line); white-space:nowrap }
th { background:var(--band) }
@media (max-width:30rem) { dl { grid-template-columns:1fr } dt { margin-top:.3rem } }
"""


def as_page(title: str, opening: str, steps: Sequence[Step]) -> str:
    """One self-contained page: no script, no request; light and dark; every text escaped."""
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(opening)}</p>"]
    for number, step in enumerate(steps, start=1):
        at = f"{step.code.file}:{step.code.line}"
        body.append(f'<h2 id="s{number}">{number}. {escape(step.title)}</h2><p>{escape(step.says)}</p>')
        body.append(f'<pre><span class="where">{escape(at)}</span>\n{escape(step.code.text)}</pre>')
        rows = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in step.facts]
        for hand in step.hand:
            mark = "" if hand.ok else ' class="wrong"'
            rows.append(f"<dt>by hand</dt><dd{mark}>{escape(str(hand))}</dd>")
        rows += [f"<dt>one token</dt><dd>{escape(cost(step))}</dd>"] if step.cost else []
        body += [f"<dl>{''.join(rows)}</dl>"] if rows else []
        if step.table:
            head, *rest = (["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in step.table])
            head = head.replace("td>", "th>")
            body.append(f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in [head, *rest])}</table></div>')
    inner = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{inner}\n</body></html>\n"
    )
