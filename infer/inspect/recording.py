"""Every value of a forward pass has a name: record it, or overwrite it.

    from infer import patch, record

    with record(model, "layers.*.attn.pattern, layers.3.mlp.out") as tape:
        model(tokens_BT)
    tape["layers.3.attn.pattern"]                                       # (B, H, T, S)

    with patch(model, {"layers.5.resid_mid[:, -1]": 0.0, "layers.*.attn.z[:, 2]": lambda z: z.mean()}):
        model(tokens_BT)

`print(record.names(model))` lists the names with their shapes and meaning. Values are picked up by hooks from the
modules that compute them; outside a recording there is no hook, so the model pays nothing.

`tape[name]` is the value of the only pass; of several, for example a generation token by token, each has its own in
`tape.passes`. Fused blocks, and attention on its fast path, run on the plain path where a name of theirs is recorded.
What a recording cannot see raises: the generation engine (infer/engine/forward.py) bypasses the modules, so their hooks
never run.
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
    """The points that some pattern names (`*` stands for anything). Raises UserError where a pattern names none."""
    if not isinstance(model, Transformer):
        raise UserError(f"recording needs a model.Transformer, not a {type(model).__name__}")
    known = points(model)
    wanted = patterns.split(",") if isinstance(patterns, str) else list(patterns)
    chosen: dict[str, Point] = {}
    for pattern in (one.strip() for one in wanted):
        matched = {name: point for name, point in known.items() if fnmatchcase(name, pattern)}
        if not matched:
            near = get_close_matches(re.sub(r"\*", "0", pattern), known, n=3, cutoff=0.3)
            hint = f"nearest: {', '.join(near)}" if near else "print(record.names(model)) lists them"
            raise UserError(f"no value of this model is called {pattern!r}; {hint}")
        chosen |= matched
    return [known[name] for name in known if name in chosen]


class Tape(Mapping[str, Tensor]):
    """What was recorded. `passes` holds each forward pass's values by name; `tape[name]` is that of the only pass."""

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
    """Keep the named values of the passes run inside: a list, or a text with commas; `*` matches anything.

    `positions` are the tokens to keep, as indices into each pass (-1: its last one). Raises UserError for names that
    the model does not have, or that no pass computed.
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
    missing = [point.name for point in chosen if any(point.name not in one for one in tape.passes)]
    if not tape.passes:
        raise UserError("nothing was recorded: no forward pass of this model was run inside the recording")
    if missing:
        raise UserError(f"nothing was recorded for {missing[0]} ({len(missing)} such): the pass did not compute it")


def names(model: Transformer) -> Names:
    """Every name that `record` and `patch` take, with its shape (the legend is in model/README.md) and meaning."""
    return Names({name: f"{point.shape}  {point.what}" for name, point in points(model).items()})


record.names = names  # type: ignore[attr-defined]


@contextlib.contextmanager
def patch(model: Transformer, changes: Mapping[str, Tensor | float | Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Overwrite named values in every pass run inside: {"layers.5.resid_mid[:, -1]": value}.

    The index after a name is Python's (integers, slices, `...`). A value is a tensor that broadcasts to what it
    replaces, a number, or a function of the value before. A recording inside or around sees what the model used.
    Raises UserError for names that the model does not have or that are only derived, for a value of another shape, and
    where no pass used the change.
    """
    used: dict[str, bool] = {}
    wanted = [(key, *_parse(key), value) for key, value in changes.items()]
    chosen = [(key, index, value, choose(model, [name])) for key, name, index, value in wanted]

    def hook(key: str, index: Any, value: Any, point: Point) -> Callable[..., Any]:
        def changed(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
            before = inputs[0] if point.side == "in" else output
            after = before.clone()
            place = after if point.view is None else point.view(_viewer(model, point, module), after)
            _overwrite(key, place, index, value)
            used[key] = True
            return (after, *inputs[1:]) if point.side == "in" else after

        return changed

    with contextlib.ExitStack() as stack:
        stack.enter_context(_plain_path(model, [point for *_, matched in chosen for point in matched]))
        for key, index, value, matched in chosen:
            for point in matched:
                if point.derived:
                    raise UserError(f"{point.name} is derived from other values; overwrite what it is computed from")
                module = model.get_submodule(point.module)
                added = module.register_forward_pre_hook if point.side == "in" else module.register_forward_hook
                stack.callback(added(hook(key, index, value, point), prepend=True).remove)
        yield
    for key in changes:
        if key not in used:
            raise UserError(f"{key} overwrote nothing: no forward pass inside computed it")


def _viewer(model: Transformer, point: Point, module: nn.Module) -> nn.Module:
    """The module whose settings a view needs: a block's attention for its parts, else the module itself."""
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
            raise UserError(f"{key!r}: {part!r} is no index; integers, slices and ... are") from error
    return found[1], tuple(index)


def _overwrite(key: str, place: Tensor, index: Any, value: Any) -> None:
    try:
        old = place[index]
    except IndexError as error:
        raise UserError(f"{key}: the index does not fit a value of shape {list(place.shape)}") from error
    new = value(old.clone()) if callable(value) else value
    new = torch.as_tensor(new, dtype=place.dtype, device=place.device)
    try:
        new = new.expand(old.shape)
    except RuntimeError as error:
        raise UserError(f"{key}: {list(new.shape)} given for a value of shape {list(old.shape)}") from error
    place[index] = new


@contextlib.contextmanager
def _plain_path(model: Transformer, chosen: Sequence[Point]) -> Iterator[None]:
    """Blocks of which a value is named run as model/transformer.py defines them, attention too where one of its values
    is; the generation engine, which bypasses the modules, raises."""
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(model.model.layers):
            own = [point for point in chosen if (point.module + ".").startswith(f"model.layers.{number}.")]
            if own and type(block) is not Block and "forward" not in vars(block):
                block.forward = MethodType(Block.forward, block)  # type: ignore[method-assign]
                stack.callback(delattr, block, "forward")
            attention = block.self_attn
            asked = any(".attend" in point.module for point in own)
            if asked and type(attention.attend) is not PlainAttend:
                stack.callback(setattr, attention, "attend", attention.attend)
                attention.attend = PlainAttend()
        running = [False]

        def enter(*_: Any) -> None:
            running[0] = True

        def leave(*_: Any) -> None:
            running[0] = False

        def guard(*_: Any) -> None:
            if not running[0]:
                raise UserError(
                    "the generation engine does not run the model's modules, so it cannot be recorded or overwritten; "
                    "generate with model(tokens, cache=KVCache(model.config)), or run one pass over the finished text"
                )

        stack.callback(model.model.register_forward_pre_hook(enter).remove)
        stack.callback(model.model.register_forward_hook(leave, always_call=True).remove)
        stack.callback(model.model.embed_tokens.register_forward_pre_hook(guard).remove)
        yield


@contextlib.contextmanager
def _passes(model: Transformer, tape: Tape) -> Iterator[None]:
    """A new set of values for each forward pass."""

    def begin(*_: Any) -> None:
        if model.model.checkpoint_blocks and torch.is_grad_enabled():
            raise UserError("blocks that are computed twice (checkpoint_blocks) would be recorded twice; switch it off")
        tape.passes.append({})

    handle = model.model.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()
