"""Continuous batching of notes: finished requests are replaced by those of the next notes.

Answering one note is a Python generator: it yields the requests that it waits for, and returns the note's record. A
thread prepares the next notes meanwhile (tokens, grammars). What is added when depends on the notes and their answers
alone, never on the clock, so the same job takes the same steps every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from infer.engine.generate import RequestBatch, State

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(eq=False)
class Group:
    """Requests about one text, prefilled together. `questions` is their size in units of tasks.QUESTION tokens."""

    states: list[State]
    questions: int

    @property
    def ended(self) -> bool:
        return all(state.finish is not None for state in self.states)


class Work:
    """A note that is being answered: it waits for `groups`; when it waits for none, `result` is its record."""

    def __init__(self, steps: Generator[list[Group], None, Any]) -> None:
        self.steps, self.result = steps, None
        self.go_on()

    def go_on(self) -> None:
        self.groups: list[Group] = []
        try:
            while not self.groups:
                self.groups = next(self.steps)
        except StopIteration as end:
            self.result = end.value


class Schedule:
    """Runs works concurrently, at most `texts` texts and `questions` questions at once. `ended` is called for each work
    that has its result."""

    def __init__(self, batch: RequestBatch, texts: int, questions: int, ended: Callable[[], object]) -> None:
        self.batch, self.texts, self.questions, self.ended = batch, texts, questions, ended
        self.begun: list[Work] = []
        self.running: list[Work] = []
        self.waiting: list[Group] = []
        self.reading: list[Group] = []

    def results(self, works: Iterator[Work]) -> list[Any]:
        """The works' results, in order."""
        while True:
            added = list(self.refill(works))
            if added:
                self.batch.add([state for group in added for state in group.states])
            elif self.batch.active:
                self.batch.step()
            else:
                return [work.result for work in self.begun]
            self.retire()

    def refill(self, works: Iterator[Work]) -> Iterator[Group]:
        """The groups that fit now: those that have waited longest, then those of new works."""
        while True:
            group = next((group for group in self.waiting if self.has_room(group)), None)
            if group is not None:
                self.waiting.remove(group)
                self.reading.append(group)
                yield group
                continue
            full = len(self.reading) == self.texts or len(self.waiting) >= self.texts
            work = None if full else next(works, None)
            if work is None:
                return
            self.begun.append(work)
            self.wait_for(work)

    def has_room(self, group: Group) -> bool:
        questions = sum(held.questions for held in self.reading)
        return len(self.reading) < self.texts and questions + group.questions <= self.questions

    def retire(self) -> None:
        self.reading = [group for group in self.reading if not group.ended]
        for work in [work for work in self.running if all(group.ended for group in work.groups)]:
            self.running.remove(work)
            work.go_on()
            self.wait_for(work)

    def wait_for(self, work: Work) -> None:
        self.waiting += work.groups
        if work.groups:
            self.running.append(work)
        else:
            self.ended()


def ahead(make: Callable[[Item], Made], items: Iterable[Item], most: int) -> Iterator[Made]:
    """`map` in a thread, at most `most` items ahead."""
    made: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            made.append(thread.submit(make, item))
            if len(made) > most:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
