"""The rows of a benchmark's result, and the table of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LESS_IS_BETTER = ("us", "ms", "ms/token", "s", "MB", "×", "%")  # first words of units; for all others more is better


@dataclass(frozen=True)
class Row:
    """Ours against a peer measured in the same run. `limit` is the bound set by the hardware, in the same unit."""

    name: str
    ours: float
    peer: float | None
    peer_name: str | None
    unit: str  # such as "us", "s to the first token", "tok/s"; its first word says which way is better
    setting: str
    limit: float | None = None

    def _better(self, value: float, than: float) -> float:
        return than / value if self.unit.split()[0] in LESS_IS_BETTER else value / than

    @property
    def ratio(self) -> float | None:
        """Above 1 if ours is better; None without a peer."""
        return self._better(self.ours, self.peer) if self.peer else None

    @property
    def share_of_limit(self) -> float | None:
        return self._better(self.ours, self.limit) if self.limit else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "share_of_limit": self.share_of_limit}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows (`Row.as_dict`) as a Markdown table; "–" for a missing value."""
    keys = ("name", "ours", "peer", "unit", "peer_name", "ratio", "limit", "share_of_limit", "setting")
    cells = [[key.replace("_", " ") for key in keys]] + [[shown(row.get(key)) for key in keys] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * w for w in width) + " |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
