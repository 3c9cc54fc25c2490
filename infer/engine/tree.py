"""Prompts as a prefix tree: tokens that several prompts begin with are prefilled and stored once.

The nine questions about a note share the note (and "### Question: "); all notes of a batch may share an instruction:

    instruction ─┬─ note 1 ─┬─ question 1 → answer          *prefix*: tokens shared by branches, or a long private part
                 │          └─ question 2 → answer          *branch*: the end of one prompt and its generated tokens
                 └─ note 2 ─── …

This file splits prompts into prefixes and branches; cache.py stores their keys and values and computes attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from infer.engine.settings import Hidden

SHARED = 8  # minimum length of a shared prefix: a shorter one is cheaper to recompute than to attend to separately
OWN = 64  # a private part of at least this length becomes a prefix, which keeps the branches' lengths similar


@dataclass
class Prefix:
    """A node of the tree: consecutive tokens that continue `parent`."""

    parent: Prefix | None
    tokens: list[int]
    start: int  # position of its first token
    branches: range = range(0)  # indices of the branches below it
    first: int = field(init=False)  # first position whose keys are kept (a sliding window drops older ones)
    keys: list[Tensor] = field(default_factory=list)  # k_GSK of each layer
    values: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.first = self.start

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> list[Prefix]:
        """The prefix and its ancestors, from the root."""
        return [*(self.parent.path() if self.parent else []), self]

    def text(self) -> list[int]:
        """All tokens from the root to the prefix's end."""
        return [token for prefix in self.path() for token in prefix.tokens]


@dataclass
class Branch:
    """The end of one prompt: `tokens` (at least one) from position `start` on; `prompt` is the prompt's index."""

    parent: Prefix | None
    tokens: list[int]
    start: int
    prompt: int


def build_tree(
    prompts: Sequence[Sequence[int]], hidden: Sequence[Hidden | None] = (), joins: bool = False
) -> tuple[list[Prefix], list[Branch]]:
    """The prefix tree of some prompts: prefixes with parents before children, and branches in depth-first order.

    `hidden` gives for each prompt what to mask; the tokens that must not see it all go to the prompt's branch. `joins`:
    the tree will join other branches. All branches take as many slots as the longest, so then even a single prompt gets
    a prefix, which keeps its branch short.
    """
    prefixes: list[Prefix] = []
    branches: list[Branch] = []
    if prompts:
        ends = [len(prompt) - 1 for prompt in prompts]  # every branch has at least one token
        ends = [end if one is None else one.after for end, one in zip(ends, hidden or [None] * len(ends), strict=True)]
        alone = len(prompts) == 1 and not joins
        _add_prompts(prompts, ends, prefixes, branches, list(range(len(prompts))), 0, None, alone)
    return prefixes, branches


def _add_prompts(
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    prefixes: list[Prefix],
    branches: list[Branch],
    indices: list[int],
    depth: int,
    parent: Prefix | None,
    alone: bool,
) -> None:
    """Adds the prompts `indices`, which are identical up to position `depth`, below `parent`. Tokens from a prompt's
    `ends` on never become part of a prefix. `alone`: one prompt is a branch as a whole."""
    # module-level on purpose: a recursive closure is a reference cycle, which keeps keys and values alive until gc runs

    def add(parent: Prefix | None, tokens: Sequence[int], start: int) -> Prefix:
        prefixes.append(Prefix(parent, list(tokens), start))
        return prefixes[-1]

    ids = prompts[indices[0]]
    if len(indices) == 1:
        end = ends[indices[0]]
        hides = end < len(ids) - 1  # the mask does not reach the tokens before `end`: their keys may be in the cache
        if end - depth >= OWN and (hides or not alone):
            parent = add(parent, ids[depth:end], depth)
            depth = end
            parent.branches = range(len(branches), len(branches) + 1)
        branches.append(Branch(parent, list(ids[depth:]), depth, indices[0]))
        return
    common = min(ends[i] for i in indices)
    for i in indices[1:]:
        common = min(common, common_length(ids, prompts[i], depth))
    began = len(branches)
    prefix = parent
    if common - depth >= SHARED:
        prefix = add(parent, ids[depth:common], depth)
        depth = common
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        # prompts that share at least SHARED further tokens form a group with a prefix of its own
        groups.setdefault(tuple(prompts[i][depth : depth + SHARED]), []).append(i)
    for group in groups.values():
        has_prefix = len(group) > 1 and min(ends[i] for i in group) >= depth + SHARED
        for part in [group] if has_prefix else [[i] for i in group]:
            _add_prompts(prompts, ends, prefixes, branches, part, depth, prefix, alone)
    if prefix is not parent and prefix is not None:
        prefix.branches = range(began, len(branches))


def common_length(one: Sequence[int], other: Sequence[int], start: int = 0) -> int:
    """Length of the common prefix of two sequences, which are known to agree before `start`."""
    end = min(len(one), len(other))
    return next((n for n in range(start, end) if one[n] != other[n]), end)
