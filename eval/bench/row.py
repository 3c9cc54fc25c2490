"""One row of a benchmark's result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """Ours against a peer measured in the same run. `limit` is what the hardware allows, in the same unit."""

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str  # "us" (less is better) or a rate such as "tok/s" (more is better)
    setting: str
    limit: float | None = None

    @property
    def ratio(self) -> float:
        """Above 1: ours is better."""
        return self.peer / self.ours if self.unit == "us" else self.ours / self.peer

    @property
    def share_of_limit(self) -> float | None:
        if self.limit is None:
            return None
        return self.limit / self.ours if self.unit == "us" else self.ours / self.limit

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "share_of_limit": self.share_of_limit}
