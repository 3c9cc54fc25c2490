"""The clinical tasks, generation and extraction. `Generator` is imported when asked for: it needs torch."""

from typing import Any

__all__ = ["Generation", "Generator", "Settings"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'infer' has no attribute {name!r}")
    from infer import generate

    return getattr(generate, name)
