"""Many notes side by side: requests that have ended make room for those of the next notes.

A note's way to its record is a Python generator, which yields what is to be answered before it goes on. The next notes
are begun (encoded, their grammars built) by a thread meanwhile. What is added when depends on the notes and their
answers alone, never on the clock, so that the same job takes the same steps every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from infer.engine.generate import Rows, State

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(eq=False)
class Piece:
    """Requests that are read at once. They take `texts` places of a note's length, and `slots` of a question's."""

    states: list[State]
    texts: int
    slots: int

    @property
    def ended(self) -> bool:
        return all(state.finish is not None for state in self.states)


class Work:
    """A note's way to its record: `pieces` are to be answered before it goes on; `result` is there when none are."""

    def __init__(self, steps: Generator[list[Piece], None, Any]) -> None:
        self.steps, self.result = steps, None
        self.go_on()

    def go_on(self) -> None:
        self.pieces: list[Piece] = []
        try:
            while not self.pieces:
                self.pieces = next(self.steps)
        except StopIteration as end:
            self.result = end.value


class Schedule:
    """Works on their way, of so many texts and slots at once. `ended` is called when one has its result."""

    def __init__(self, rows: Rows, texts: int, slots: int, ended: Callable[[], object]) -> None:
        self.rows, self.texts, self.slots, self.ended = rows, texts, slots, ended
        self.begun: list[Work] = []
        self.running: list[Work] = []
        self.waiting: list[Piece] = []
        self.reading: list[Piece] = []

    def results(self, works: Iterator[Work]) -> list[Any]:
        """The works' results, in order."""
        while True:
            added = list(self.refill(works))
            if added:
                self.rows.add([state for piece in added for state in piece.states])
            elif self.rows.active:
                self.rows.step()
            else:
                return [work.result for work in self.begun]
            self.retire()

    def refill(self, works: Iterator[Work]) -> Iterator[Piece]:
        """The pieces for which there is room now: those that have waited longest, then those of works that begin."""
        while True:
            piece = next((piece for piece in self.waiting if self.has_room(piece)), None)
            if piece is not None:
                self.waiting.remove(piece)
                self.reading.append(piece)
                yield piece
                continue
            full = sum(held.texts for held in self.reading) == self.texts or len(self.waiting) >= self.texts
            work = None if full else next(works, None)
            if work is None:
                return
            self.begun.append(work)
            self.wait_for(work)

    def has_room(self, piece: Piece) -> bool:
        texts = sum(held.texts for held in self.reading)
        slots = sum(held.slots for held in self.reading)
        return texts + piece.texts <= self.texts and slots + piece.slots <= self.slots

    def retire(self) -> None:
        self.reading = [piece for piece in self.reading if not piece.ended]
        for work in [work for work in self.running if all(piece.ended for piece in work.pieces)]:
            self.running.remove(work)
            work.go_on()
            self.wait_for(work)

    def wait_for(self, work: Work) -> None:
        self.waiting += work.pieces
        if work.pieces:
            self.running.append(work)
        else:
            self.ended()


def ahead(make: Callable[[Item], Made], items: Iterable[Item], most: int) -> Iterator[Made]:
    """`map`, by a thread that is at most `most` items ahead."""
    made: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            made.append(thread.submit(make, item))
            if len(made) > most:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
