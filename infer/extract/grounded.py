"""Constrained decoding: an automaton over bytes decides which tokens may come next.

A phenotype's answer is "not relevant" or values separated by "; ". The values are from a closed list if the phenotype
has one, else spans of the note that begin and end at the edges of places.py. A diagnosis is a line of ICD-10-CM,
"description (code)".

The automaton reads bytes, not tokens, so every tokenization of a span is allowed; a span may begin in the middle of one
of the note's own tokens. White space of the note counts as one space. The automaton is nondeterministic, because a
prefix such as "2.5" may occur at several places of the note: its position is a set of states, each one of

    ("begin", n)      n leading spaces so far             ("span", i)          byte i of the note comes next
    ("value",)        a value begins                      ("closed", j, i)     byte i of closed value j comes next
    ("separator", i)  byte i of "; " comes next           ("exclusive", j, i)  byte i of exclusive answer j comes next
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
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
    """The bytes of all ordinary tokens as a trie: node = [ids of tokens that end here, {next byte: node}]."""

    def __init__(self, tokenizer: Tokenizer, device: str | torch.device = "cpu") -> None:
        self.device = device  # of the lists of allowed ids
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


def byte_offsets(note: str) -> dict[int, int]:
    """Maps offsets in a note (characters; word ends included) to offsets in the UTF-8 bytes of its words joined by
    single spaces."""
    offsets: dict[int, int] = {}
    size = 0
    for word in re.finditer(r"\S+", note):
        size += bool(offsets)  # the space before
        for n, character in enumerate(word[0], start=word.start()):
            offsets[n] = size
            size += len(character.encode())
        offsets[word.end()] = size
    return offsets


def token_bytes(tokenizer: Tokenizer, i: int) -> bytes | None:
    """The bytes that a token adds to the text; None for special tokens."""
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
    """The legal answers to one question about one note.

    An answer consists of spans of `note` or of entries of the closed list `values` (give one of the two), or is one of
    the `exclusive` answers. `edges` are the offsets in the note at which a span may begin or end (default: those of
    places.py). For a window of a note, give the whole note's edges: the window may cut a word or number.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        end_ids: Iterable[int],
        note: str = "",
        values: Sequence[str] = (),
        exclusive: Sequence[str] = (tasks.NOT_RELEVANT,),
        edges: Iterable[int] | None = None,
    ) -> None:
        self.vocabulary, self.end_ids = vocabulary, sorted(end_ids)
        self.values, self.exclusive = [v.encode() for v in values], [a.encode() for a in exclusive]
        self.note = b" ".join(word.encode() for word in note.split())
        offsets = byte_offsets(note)
        at_edges = {offsets[n] for n in (places.edges(note) if edges is None else edges) if n in offsets}
        self.stops = frozenset(i for i in at_edges if i > 0 and self.note[i - 1] not in (SEMICOLON, SPACE))
        self.last = max(self.stops, default=0)  # no span goes beyond
        self.starts = sorted(i for i in at_edges if i < self.last and self.note[i] not in (SEMICOLON, SPACE))
        self.memo: dict[States, Tensor] = {}
        if not self.end_ids:  # a tokenizer without an end token: a line feed ends the answer
            self.end_ids = list(vocabulary.root[1].get(10, [[], {}])[0])

    def begin(self) -> States:
        return frozenset([("begin", 0)])

    def next(self, states: States) -> dict[int, States]:
        """Maps each legal next byte to the states it leads to."""
        found: dict[int, set[State]] = {}
        for state in states:
            for byte, reached in self._transitions(state):
                found.setdefault(byte, set()).add(reached)
        return {byte: frozenset(reached) for byte, reached in found.items()}

    def _transitions(self, state: State) -> Iterator[tuple[int, State]]:
        kind = state[0]
        if kind == "begin":
            if state[1] < 2:
                yield SPACE, ("begin", state[1] + 1)
            for number, text in enumerate(self.exclusive):
                yield text[0], ("exclusive", number, 1)
        if kind in ("begin", "value"):
            for start in self.starts:
                yield self.note[start], ("span", start + 1)
            for number, text in enumerate(self.values):
                yield text[0], ("closed", number, 1)
        elif kind == "separator":
            after = state[1] + 1
            yield SEPARATOR[state[1]], ("separator", after) if after < len(SEPARATOR) else ("value",)
        elif kind == "span":
            if state[1] < self.last:
                yield self.note[state[1]], ("span", state[1] + 1)
        else:
            text = self._text(state)
            if state[2] < len(text):
                yield text[state[2]], (kind, state[1], state[2] + 1)
        if kind in ("span", "closed") and self.may_end(state):
            yield SEPARATOR[0], ("separator", 1)

    def _text(self, state: State) -> bytes:
        """The text that a "closed" or "exclusive" state is in."""
        return (self.values if state[0] == "closed" else self.exclusive)[state[1]]

    def may_end(self, state: State) -> bool:
        """True if the answer is complete in this state."""
        if state[0] == "span":
            return state[1] in self.stops
        return state[0] in ("closed", "exclusive") and state[2] == len(self._text(state))

    def read(self, states: States, data: bytes) -> States:
        """The states after some more bytes; empty if they are not legal."""
        for byte in data:
            states = self.next(states).get(byte, frozenset())
        return states

    def allowed(self, states: States) -> Tensor:
        """Ids (int64, ascending) of the tokens that keep the answer legal; end tokens are included if it may end."""
        if states not in self.memo:
            ids = list(self.end_ids) if any(self.may_end(state) for state in states) else []
            stack = [(self.vocabulary.root, states)]
            while stack:
                node, here = stack.pop()
                for byte, reached in self.next(here).items():
                    below = node[1].get(byte)
                    if below is not None:
                        ids += below[0]
                        stack.append((below, reached))
            found = sorted(set(ids)) or list(self.end_ids)
            self.memo[states] = torch.tensor(found, dtype=torch.int64, device=self.vocabulary.device)
        return self.memo[states]

    def longest_complete(self, text: str) -> str:
        """The longest prefix of `text` that is a complete answer, "" if none: for an answer cut off by its limit."""
        states, best, data = self.begin(), 0, text.encode()
        for end, byte in enumerate(data, start=1):
            states = self.next(states).get(byte, frozenset())
            if any(self.may_end(state) for state in states):
                best = end
        return data[:best].decode("utf-8", errors="ignore")


class Grounded:
    """A grammar as `Settings.constraint` of a request. Keeps the states after the tokens seen last, so each further
    token costs one step; other tokens are read from the start."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar, self.states = grammar, grammar.begin()
        self.seen: list[int] = []

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Ids of the tokens allowed after `tokens`, the answer so far."""
        if self.seen != list(tokens[: len(self.seen)]):
            self.states, self.seen = self.grammar.begin(), []
        for token in tokens[len(self.seen) :]:
            self.states = self.grammar.read(self.states, self.grammar.vocabulary.bytes.get(token, b""))
        self.seen = list(tokens)
        return self.grammar.allowed(self.states)


class Grounding:
    """Makes the grammars for one tokenizer. The vocabulary's trie and the grammars that do not depend on a note are
    built once."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int], device: str | torch.device = "cpu") -> None:
        self.vocabulary, self.end_ids = Vocabulary(tokenizer, device), sorted(end_ids)
        lines = [f"{codes.CODES[code]} ({code})" for code in codes.CODES]
        self.diagnosis = Grammar(self.vocabulary, self.end_ids, exclusive=[*lines, tasks.NOT_RELEVANT])
        closed = {name: p.values for name, p in tasks.PHENOTYPES.items() if p.values}
        self.closed = {name: Grammar(self.vocabulary, self.end_ids, values=values) for name, values in closed.items()}

    def of_note(self, note: str, edges: Iterable[int] | None = None) -> dict[str, Grammar]:
        """The grammar of each question about one note, by name; "" is that of the note's own questions (spans)."""
        spans = Grammar(self.vocabulary, self.end_ids, note=note, edges=edges)
        return {"": spans, "diagnosis": self.diagnosis, **dict.fromkeys(tasks.PHENOTYPES, spans), **self.closed}
