"""Constrained decoding: an automaton over bytes decides which tokens may come next.

A phenotype's answer is "not relevant", or values separated by "; ": of its closed list where it has one, else spans of
the note, from edge to edge (infer/extract/places.py). A diagnosis is a line of ICD-10-CM, "description
(code)".

The automaton reads bytes, not tokens, so every tokenization of a span is allowed: a span may begin in the
middle of a token of the note's own tokenization. In the
note, any white space is one space. A state is one of

    ("begin", n)      n leading spaces so far             ("span", i)       the note's byte i comes next
    ("value",)        a value begins                      ("one", j, i)     byte i of closed value j comes next
    ("separator", i)  byte i of "; " comes next           ("only", j, i)    byte i of an exclusive answer
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from infer import codes, tasks
from infer.extract import places
from model.text.engines import BYTES
from model.text.tokenizer import Tokenizer

State = tuple[Any, ...]
States = frozenset[State]
SEPARATOR = tasks.SEPARATOR.encode()
SEMICOLON, SPACE = SEPARATOR


class Vocabulary:
    """The bytes of every ordinary token, as a tree: node = [ids that end here, {next byte: node}]."""

    def __init__(self, tokenizer: Tokenizer, device: str | torch.device = "cpu") -> None:
        self.device = device  # where masks are kept
        self.bytes: dict[int, bytes] = {}
        self.root: list[Any] = [[], {}]
        for i in range(tokenizer.vocab_size):
            spelling = token_bytes(tokenizer, i)
            if not spelling:
                continue
            self.bytes[i] = spelling
            node = self.root
            for byte in spelling:
                node = node[1].setdefault(byte, [[], {}])
            node[0].append(i)


def byte_places(note: str) -> dict[int, int]:
    """Where a note's characters begin, and its words end, in the bytes of its words joined by single spaces."""
    at: dict[int, int] = {}
    size = 0
    for word in re.finditer(r"\S+", note):
        size += bool(at)  # the space before
        for n, character in enumerate(word[0], start=word.start()):
            at[n] = size
            size += len(character.encode())
        at[word.end()] = size
    return at


def token_bytes(tokenizer: Tokenizer, i: int) -> bytes | None:
    """What a token adds to the text; None for special tokens."""
    engine = tokenizer.engine
    piece = engine.piece(i)
    if piece is None or i in tokenizer.stop_ids or engine.special(piece) == i:
        return None
    if getattr(engine, "byte_level", False):
        return bytes(BYTES[c] for c in piece) if all(c in BYTES for c in piece) else None
    found = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if found:
        return bytes([int(found[1], 16)])
    return None if piece == "<unk>" else piece.replace("▁", " ").encode()


class Grammar:
    """The legal answers to one question about one note. `values` is a closed list, `note` the text of spans (one of
    the two), `alone` the answers that exclude all others. `edges` are the places in the note where a span may begin or
    end; those of a part of a note are the whole note's, so that a word or number that was cut is never offered."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        ends: Iterable[int],
        note: str = "",
        values: Sequence[str] = (),
        alone: Sequence[str] = (tasks.NOT_RELEVANT,),
        edges: Iterable[int] | None = None,
    ) -> None:
        self.vocabulary, self.ends = vocabulary, sorted(ends)
        self.values, self.alone = [v.encode() for v in values], [a.encode() for a in alone]
        self.note = b" ".join(word.encode() for word in note.split())
        at = byte_places(note)
        stops = {at[n] for n in (places.edges(note) if edges is None else edges) if n in at}
        self.stops = frozenset(i for i in stops if i > 0 and self.note[i - 1] not in (SEMICOLON, SPACE))
        self.last = max(self.stops, default=0)  # a span goes no further
        self.starts = sorted(i for i in stops if i < self.last and self.note[i] not in (SEMICOLON, SPACE))
        self.memo: dict[States, Tensor] = {}
        if not self.ends:  # a tokenizer without an end token: a line's end ends the answer
            self.ends = list(vocabulary.root[1].get(10, [[], {}])[0])

    def begin(self) -> States:
        return frozenset([("begin", 0)])

    def next(self, states: States) -> dict[int, States]:
        """Which states each legal next byte leads to."""
        found: dict[int, set[State]] = {}

        def go(byte: int, state: State) -> None:
            found.setdefault(byte, set()).add(state)

        def value() -> None:
            for start in self.starts:
                go(self.note[start], ("span", start + 1))
            for number, text in enumerate(self.values):
                go(text[0], ("one", number, 1))

        for state in states:
            kind = state[0]
            if kind == "begin":
                if state[1] < 2:
                    go(32, ("begin", state[1] + 1))
                value()
                for number, text in enumerate(self.alone):
                    go(text[0], ("only", number, 1))
            elif kind == "value":
                value()
            elif kind == "separator":
                after = state[1] + 1
                go(SEPARATOR[state[1]], ("separator", after) if after < len(SEPARATOR) else ("value",))
            elif kind == "span":
                if state[1] < self.last:
                    go(self.note[state[1]], ("span", state[1] + 1))
            else:
                text = (self.values if kind == "one" else self.alone)[state[1]]
                if state[2] < len(text):
                    go(text[state[2]], (kind, state[1], state[2] + 1))
            if kind in ("span", "one") and self.whole(state):
                go(SEPARATOR[0], ("separator", 1))
        return {byte: frozenset(reached) for byte, reached in found.items()}

    def whole(self, state: State) -> bool:
        """Whether an answer may end here."""
        if state[0] == "span":
            return state[1] in self.stops
        if state[0] in ("one", "only"):
            return state[2] == len((self.values if state[0] == "one" else self.alone)[state[1]])
        return False

    def read(self, states: States, data: bytes) -> States:
        for byte in data:
            states = self.next(states).get(byte, frozenset())
        return states

    def allowed(self, states: States) -> Tensor:
        """The ids (int64) of tokens that keep the answer legal, and the end tokens where it is whole."""
        if states not in self.memo:
            ids = list(self.ends) if any(self.whole(state) for state in states) else []
            stack = [(self.vocabulary.root, states)]
            while stack:
                node, here = stack.pop()
                for byte, reached in self.next(here).items():
                    below = node[1].get(byte)
                    if below is not None:
                        ids += below[0]
                        stack.append((below, reached))
            found = sorted(set(ids)) or list(self.ends)
            self.memo[states] = torch.tensor(found, dtype=torch.int64, device=self.vocabulary.device)
        return self.memo[states]

    def complete(self, text: str) -> str:
        """The longest beginning of `text` that is a whole answer ("" where none is): for one that was cut short."""
        states, best, data = self.begin(), 0, text.encode()
        for end, byte in enumerate(data, start=1):
            states = self.next(states).get(byte, frozenset())
            if any(self.whole(state) for state in states):
                best = end
        return data[:best].decode("utf-8", errors="ignore")


class Grounded:
    """A request's position in a grammar, as `Settings.constraint`. More of the same tokens are read from the last
    state, other tokens from the beginning, so requests may share it, at a cost in time."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar, self.states = grammar, grammar.begin()
        self.seen: list[int] = []

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        if self.seen != list(tokens[: len(self.seen)]):
            self.states, self.seen = self.grammar.begin(), []
        for token in tokens[len(self.seen) :]:
            self.states = self.grammar.read(self.states, self.grammar.vocabulary.bytes.get(token, b""))
        self.seen = list(tokens)
        return self.grammar.allowed(self.states)


class Grounding:
    """The grammars of a tokenizer: its vocabulary's tree is made once, the diagnosis's grammar too."""

    def __init__(self, tokenizer: Tokenizer, ends: Iterable[int], device: str | torch.device = "cpu") -> None:
        self.vocabulary, self.ends = Vocabulary(tokenizer, device), sorted(ends)
        lines = [f"{codes.CODES[code]} ({code})" for code in codes.CODES]
        self.diagnosis = Grammar(self.vocabulary, self.ends, alone=[*lines, tasks.NOT_RELEVANT])
        closed = {name: p.values for name, p in tasks.PHENOTYPES.items() if p.values}
        self.closed = {name: Grammar(self.vocabulary, self.ends, values=values) for name, values in closed.items()}

    def of_note(self, note: str, edges: Iterable[int] | None = None) -> dict[str, Grammar]:
        """The grammar of each question about one note; "" is a question of the note's own, answered in spans."""
        spans = Grammar(self.vocabulary, self.ends, note=note, edges=edges)
        return {"": spans, "diagnosis": self.diagnosis, **dict.fromkeys(tasks.PHENOTYPES, spans), **self.closed}
