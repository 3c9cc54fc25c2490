"""Draw docs/packages.svg from the code's own imports (`make drawing`): a row for each package, a box for each
sub-package and one for the package's own files, arrows from what imports to what is imported. Between packages the
arrows are at the right; inside one they pass above the boxes to the right and below them to the left.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "model", "lora", "infer", "train", "eval")
LEFT, WIDE, HIGH, GAP, PITCH = 70, 96, 28, 16, 130  # px: labels, a box's width and height, between boxes, a row
STYLE = """text{font:13px sans-serif;fill:#24292f}.name{font-weight:600}rect{fill:#fff;stroke:#8c959f}
.row{fill:#f3f5f7;stroke:none}path{fill:none;stroke:#57606a;stroke-width:1.2}marker path{fill:#57606a;stroke:none}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}rect{fill:#21262d;stroke:#6e7681}.row{fill:#161b22}
path{stroke:#9da7b3}marker path{fill:#9da7b3}}"""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}


def imported(text: str, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that a file imports, anywhere in it."""
    known, found = set(modules), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module} & known
    return found


IMPORTS = {name: imported(file.read_text(encoding="utf-8"), FILES) for name, file in FILES.items()}


def folder(module: str) -> str:
    return module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]


def arrow(x: float, y: float, to_x: float, to_y: float, bend_x: float, bend_y: float) -> str:
    bends = f"{x + bend_x:g} {y + bend_y:g} {to_x + bend_x:g} {to_y + bend_y:g}"
    return f'<path marker-end="url(#tip)" d="M{x:g} {y:g}C{bends} {to_x:g} {to_y:g}"/>'


def draw() -> str:
    edges = sorted({(folder(name), folder(other)) for name, others in IMPORTS.items() for other in others})
    above = sorted({(one.split(".")[0], other.split(".")[0]) for one, other in edges})
    rows = list(TopologicalSorter({p: [b for a, b in above if a == p != b] for p in PACKAGES}).static_order())[::-1]
    folders = {package: sorted({folder(name) for name in FILES if name.split(".")[0] == package}) for package in rows}
    right = LEFT + max(map(len, folders.values())) * (WIDE + GAP)
    shapes, arrows = [], []
    for row, package in enumerate(rows):
        top, y = row * PITCH + 4, row * PITCH + PITCH / 2
        boxes = sorted(folders[package], key=lambda f: (f != package, sum(b == f for _, b in edges), f))
        shapes.append(f'<rect class="row" x="4" y="{top}" width="{right}" height="{PITCH - 8}" rx="8"/>')
        shapes.append(f'<text class="name" x="16" y="{y + 5:g}">{package}</text>')
        centres = {name: LEFT + WIDE / 2 + place * (WIDE + GAP) for place, name in enumerate(boxes)}
        for name, x in centres.items():
            shapes.append(f'<rect x="{x - WIDE / 2:g}" y="{y - HIGH / 2:g}" width="{WIDE}" height="{HIGH}" rx="5"/>')
            label = "own files" if name == package else name.partition(".")[2]
            shapes.append(f'<text text-anchor="middle" x="{x:g}" y="{y + 4:g}">{label}</text>')
        for one, other in edges:
            if one != other and one in centres and other in centres:
                x, to_x = centres[one], centres[other]
                side, steps = (1 if to_x > x else -1), abs(to_x - x) / (WIDE + GAP)
                edge_y, out = y - side * HIGH / 2, side * (8 + 4 * steps)
                arrows.append(arrow(x + out, edge_y, to_x - out, edge_y, 0, -side * (12 + 6 * steps)))
        for steps, other in enumerate(rows[row + 1 :], start=1):
            if (package, other) in above:
                end_y = y + (PITCH - 6) * steps
                arrows.append(arrow(right + 4, y + 6 * steps, right + 4, end_y, 20 + 22 * steps, 0))
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip += '<path d="M0 0L8 4L0 8z"/></marker>'
    size = f'width="{right + 130}" height="{len(rows) * PITCH}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{tip}'
    return "\n".join([head, *shapes, *arrows, "</svg>\n"])


if __name__ == "__main__":
    (ROOT / "docs" / "packages.svg").write_text(draw(), encoding="utf-8")
