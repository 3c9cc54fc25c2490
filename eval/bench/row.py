"""One row of a benchmark's result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LESS_IS_BETTER = ("us", "ms", "ms/token", "s", "MB", "×", "%")  # first words of units; of any other unit more is better


@dataclass(frozen=True)
class Row:
    """Ours against a peer measured in the same run. `limit` is what the hardware allows, in the same unit."""

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
        """Above 1: ours is better. None without a peer."""
        return self._better(self.ours, self.peer) if self.peer else None

    @property
    def share_of_limit(self) -> float | None:
        return self._better(self.ours, self.limit) if self.limit else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "share_of_limit": self.share_of_limit}
