"""Prompts as a tree: what several prompts begin with is computed and kept once.

Nine questions about a note share the note (and "### Question: "), all notes of a batch may share an instruction, which
is then computed once a batch:

    instruction ─┬─ note 1 ─┬─ question 1 → answer          a *prefix* is shared by branches, or long
                 │          └─ question 2 → answer          a *branch* is a prompt's own end and what it generates
                 └─ note 2 ─── …

Here is which tokens go where; cache.py keeps their keys and values, and attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from infer.engine.settings import Hidden

SHARED = 8  # tokens: a shorter common prefix is cheaper to compute again than to attend to separately
OWN = 64  # tokens: a longer private part becomes a prefix, so that branches of a batch stay of similar length


@dataclass
class Prefix:
    """Consecutive tokens below `parent`; `branches` are those below it, a range in the order of the tree."""

    parent: Prefix | None
    tokens: list[int]
    start: int  # the position of its first token
    branches: range = range(0)
    first: int = field(init=False)  # the first position that is kept (a window drops older ones)
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
    """A prompt's own end: `tokens` (at least one) from position `start`; `prompt` is its index in the request."""

    parent: Prefix | None
    tokens: list[int]
    start: int
    prompt: int


def plan(prompts: Sequence[Sequence[int]], hidden: Sequence[Hidden | None] = ()) -> tuple[list[Prefix], list[Branch]]:
    """The tree of some prompts: prefixes with parents before children, branches in the tree's order. Of a prompt with
    something `hidden`, what does not see it is its branch's own."""
    prefixes: list[Prefix] = []
    branches: list[Branch] = []
    if prompts:
        ends = [len(prompt) - 1 for prompt in prompts]  # every branch keeps a token of its own
        ends = [end if one is None else one.after for end, one in zip(ends, hidden or [None] * len(ends), strict=True)]
        grow(prompts, ends, prefixes, branches, list(range(len(prompts))), 0, None)
    return prefixes, branches


def grow(
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    prefixes: list[Prefix],
    branches: list[Branch],
    indices: list[int],
    depth: int,
    parent: Prefix | None,
) -> None:
    """Enter the prompts of these indices, which are alike before `depth`, below `parent`; at most the tokens before
    their `ends` become prefixes."""
    # module-level on purpose: a recursive closure is a reference cycle, which keeps keys and values alive until gc runs

    def add(parent: Prefix | None, tokens: Sequence[int], start: int) -> Prefix:
        prefixes.append(Prefix(parent, list(tokens), start))
        return prefixes[-1]

    ids = prompts[indices[0]]
    if len(indices) == 1:
        end = ends[indices[0]]
        hides = end < len(ids) - 1  # what is hidden from the prompt's end is not hidden from the prefix, which is kept
        if end - depth >= OWN and (len(prompts) > 1 or hides):
            parent = add(parent, ids[depth:end], depth)
            depth = end
            parent.branches = range(len(branches), len(branches) + 1)
        branches.append(Branch(parent, list(ids[depth:]), depth, indices[0]))
        return
    common = min(ends[i] for i in indices)
    for i in indices[1:]:
        common = min(common, shared(ids, prompts[i], depth))
    began = len(branches)
    prefix = parent
    if common - depth >= SHARED:
        prefix = add(parent, ids[depth:common], depth)
        depth = common
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        # a group below starts where its prompts share more than the prefix; single ones are branches
        groups.setdefault(tuple(prompts[i][depth : depth + SHARED]), []).append(i)
    for group in groups.values():
        whole = len(group) > 1 and min(ends[i] for i in group) >= depth + SHARED
        for part in [group] if whole else [[i] for i in group]:
            grow(prompts, ends, prefixes, branches, part, depth, prefix)
    if prefix is not parent and prefix is not None:
        prefix.branches = range(began, len(branches))


def shared(one: Sequence[int], other: Sequence[int], start: int = 0) -> int:
    """How many tokens two sequences begin with together; those before `start` are known to be."""
    end = min(len(one), len(other))
    return next((n for n in range(start, end) if one[n] != other[n]), end)
