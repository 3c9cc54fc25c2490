"""Records or overwrites named values of a forward pass.

    from infer import patch, record

    with record(model, "layers.*.attn.pattern, layers.3.mlp.out") as tape:
        model(tokens_BT)
    tape["layers.3.attn.pattern"]                                       # (B, H, T, S)

    with patch(model, {"layers.5.resid_mid[:, -1]": 0.0, "layers.*.attn.z[:, 2]": lambda z: z.mean()}):
        model(tokens_BT)

`print(record.names(model))` lists the names with their shapes and meaning. Hooks on the modules take the values;
outside `record` and `patch` there are no hooks and no cost.

`tape[name]` is the value if there was one forward pass; with several, for example token-by-token generation, use
`tape.passes`. Blocks and attention with a recorded value run on the plain path instead of a fused or fast one. The
generation engine (infer/engine/forward.py) bypasses the modules, so hooks never fire: `record` raises.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from infer.inspect.points import Names, Point, points
from model import Transformer
from model.attention import PlainAttend
from model.support.cli import UserError
from model.transformer import Block


def choose(model: Transformer, patterns: str | Sequence[str]) -> list[Point]:
    """The points matched by any of the patterns (`*` matches anything). Raises UserError if a pattern matches none."""
    if not isinstance(model, Transformer):
        raise UserError(f"recording needs a model.Transformer, not a {type(model).__name__}")
    known = points(model)
    chosen: dict[str, Point] = {}
    for pattern in patterns.split(",") if isinstance(patterns, str) else patterns:
        pattern = pattern.strip()
        matched = {name: point for name, point in known.items() if fnmatchcase(name, pattern)}
        if not matched:
            near = get_close_matches(re.sub(r"\*", "0", pattern), known, n=3, cutoff=0.3)
            hint = f"nearest: {', '.join(near)}" if near else "print(record.names(model)) lists them"
            raise UserError(f"no value of this model is called {pattern!r}; {hint}")
        chosen |= matched
    return [known[name] for name in known if name in chosen]


class Tape(Mapping[str, Tensor]):
    """Recorded values. `passes` holds the values of each forward pass by name; `tape[name]` requires a single pass."""

    def __init__(self, chosen: Sequence[Point]) -> None:
        self.shapes = {point.name: point.shape for point in chosen}
        self.passes: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise UserError(f"{name!r} was not recorded; the tape holds {', '.join(self.shapes)}")
        if len(self.passes) != 1:
            raise UserError(f"{len(self.passes)} passes were recorded; read tape.passes[i][{name!r}]")
        return self.passes[0][name]


@contextlib.contextmanager
def record(model: Transformer, names: str | Sequence[str], *, positions: Sequence[int] | None = None) -> Iterator[Tape]:
    """Records the named values of the forward passes run inside. `names` is a list or comma-separated; `*` matches
    anything.

    `positions` are the token positions to keep, as indices into each pass (-1: the last one). Raises UserError for
    names that the model does not have, or that a pass did not compute.
    """
    chosen = choose(model, names)
    tape = Tape(chosen)

    def keep(point: Point, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim() == len(point.shape):
            value = value.detach()
            if positions is None:
                tape.passes[-1][point.name] = value.clone()
            else:
                rows = torch.as_tensor(positions, device=value.device) % value.shape[point.shape.index("T")]
                tape.passes[-1][point.name] = value.index_select(point.shape.index("T"), rows)

    def hook(point: Point) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> None:
            value = inputs[0] if point.side == "in" else output
            if point.view is not None:
                value = point.view(_viewer(model, point, module), value)
            keep(point, value)

        return seen

    with contextlib.ExitStack() as stack:
        stack.enter_context(_plain_path(model, chosen))
        stack.enter_context(_passes(model, tape))
        for point in chosen:
            module = model.get_submodule(point.module)
            added = module.register_forward_pre_hook if point.side == "in" else module.register_forward_hook
            stack.callback(added(hook(point)).remove)
        yield tape
    missing = [point.name for point in chosen if any(point.name not in values for values in tape.passes)]
    if not tape.passes:
        raise UserError("nothing was recorded: no forward pass of this model was run inside the recording")
    if missing:
        raise UserError(f"nothing was recorded for {missing[0]}: a pass did not compute it")


def names(model: Transformer) -> Names:
    """All names that `record` and `patch` accept, with shapes (legend in model/README.md) and meaning."""
    return Names({name: f"{point.shape}  {point.what}" for name, point in points(model).items()})


record.names = names  # type: ignore[attr-defined]


@contextlib.contextmanager
def patch(model: Transformer, changes: Mapping[str, Tensor | float | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Overwrites named values in all forward passes run inside: {"layers.5.resid_mid[:, -1]": value}.

    A name may be followed by an index (integers, slices, `...`). A value is a number, a tensor that broadcasts to what
    it replaces, or a function of the old value. `record`, inside or around, records the new value. Raises UserError for
    names that the model does not have or that are derived, for a value that does not broadcast, and for a change that
    no pass used.
    """
    used: set[str] = set()
    parsed = [(key, *_parse(key), value) for key, value in changes.items()]
    chosen = [(key, index, value, choose(model, [name])) for key, name, index, value in parsed]

    def hook(key: str, index: Any, value: Any, point: Point) -> Callable[..., Any]:
        def changed(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
            old = inputs[0] if point.side == "in" else output
            new = old.clone()
            target = new if point.view is None else point.view(_viewer(model, point, module), new)
            _overwrite(key, target, index, value)
            used.add(key)
            return (new, *inputs[1:]) if point.side == "in" else new

        return changed

    with contextlib.ExitStack() as stack:
        stack.enter_context(_plain_path(model, [point for *_, matched in chosen for point in matched]))
        for key, index, value, matched in chosen:
            for point in matched:
                if point.derived:
                    raise UserError(f"{point.name} is derived from other values; overwrite those instead")
                module = model.get_submodule(point.module)
                added = module.register_forward_pre_hook if point.side == "in" else module.register_forward_hook
                stack.callback(added(hook(key, index, value, point), prepend=True).remove)
        yield
    for key in changes:
        if key not in used:
            raise UserError(f"{key} overwrote nothing: no forward pass run inside computed it")


def _viewer(model: Transformer, point: Point, module: nn.Module) -> nn.Module:
    """The module to pass to `point.view`: the attention module for its submodules, else the module itself."""
    at, found, _ = point.module.partition(".self_attn")
    return model.get_submodule(at + found) if found else module


def _parse(key: str) -> tuple[str, Any]:
    """A name and the index after it: "layers.5.resid_mid[:, -1]" → ("layers.5.resid_mid", (slice(None), -1))."""
    found = re.fullmatch(r"([^\[\]]+?)\s*(?:\[([-\d:,.\s]*)\])?", key.strip())
    if found is None:
        raise UserError(f"{key!r} is not a name with an index; write for example 'layers.5.resid_mid[:, -1]'")
    index: list[Any] = []
    for part in found[2].split(",") if found[2] is not None else ["..."]:
        part = part.strip()
        try:
            if part == "...":
                index.append(...)
            elif ":" in part:
                index.append(slice(*(int(one) if one.strip() else None for one in part.split(":"))))
            else:
                index.append(int(part))
        except (TypeError, ValueError) as error:
            raise UserError(f"{key!r}: {part!r} is not an index; use integers, slices or ...") from error
    return found[1], tuple(index)


def _overwrite(key: str, target: Tensor, index: Any, value: Any) -> None:
    """target[index] = value, where `value` may be a function of target[index]. Raises UserError if shapes differ."""
    try:
        old = target[index]
    except IndexError as error:
        raise UserError(f"{key}: the index does not fit a value of shape {list(target.shape)}") from error
    new = value(old.clone()) if callable(value) else value
    new = torch.as_tensor(new, dtype=target.dtype, device=target.device)
    try:
        new = new.expand(old.shape)
    except RuntimeError as error:
        raise UserError(f"{key}: a value of shape {list(new.shape)} cannot replace {list(old.shape)}") from error
    target[index] = new


@contextlib.contextmanager
def _plain_path(model: Transformer, chosen: Sequence[Point]) -> Iterator[None]:
    """Runs blocks with a chosen value by Block.forward, and attention with one by PlainAttend. Raises in the generation
    engine."""
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(model.model.layers):
            inside = [point for point in chosen if (point.module + ".").startswith(f"model.layers.{number}.")]
            if inside and type(block) is not Block and "forward" not in vars(block):
                block.forward = MethodType(Block.forward, block)  # type: ignore[method-assign]
                stack.callback(delattr, block, "forward")
            attention = block.self_attn
            needs_plain = any(".attend" in point.module for point in inside)
            if needs_plain and type(attention.attend) is not PlainAttend:
                stack.callback(setattr, attention, "attend", attention.attend)
                attention.attend = PlainAttend()
        stack.enter_context(_no_engine(model))
        yield


@contextlib.contextmanager
def _no_engine(model: Transformer) -> Iterator[None]:
    """Raises UserError if the generation engine runs inside: it calls embed_tokens without calling model.model."""
    running = False

    def enter(*_: Any) -> None:
        nonlocal running
        running = True

    def leave(*_: Any) -> None:
        nonlocal running
        running = False

    def guard(*_: Any) -> None:
        if not running:
            raise UserError(
                "the generation engine does not run the model's modules, so it cannot be recorded or overwritten; "
                "generate with model(tokens, cache=KVCache(model.config)), or run one pass over the finished text"
            )

    with contextlib.ExitStack() as stack:
        stack.callback(model.model.register_forward_pre_hook(enter).remove)
        stack.callback(model.model.register_forward_hook(leave, always_call=True).remove)
        stack.callback(model.model.embed_tokens.register_forward_pre_hook(guard).remove)
        yield


@contextlib.contextmanager
def _passes(model: Transformer, tape: Tape) -> Iterator[None]:
    """Begins a new dict in `tape.passes` at each forward pass."""

    def begin(*_: Any) -> None:
        if model.model.checkpoint_blocks and torch.is_grad_enabled():
            raise UserError("activation checkpointing computes blocks twice; switch checkpoint_blocks off to record")
        tape.passes.append({})

    handle = model.model.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()
