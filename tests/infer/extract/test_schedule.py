"""Works side by side: never more than there is room for, all answered, and no room left while one waits."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from infer.extract.schedule import Group, Schedule, Work, ahead


class Lengths:
    """A batch whose requests take so many tokens each (`left`), and nothing else."""

    def __init__(self):
        self.active, self.most, self.calls = [], 0, 0

    def add(self, states):
        self.active = [*self.active, *states]
        self.most = max(self.most, len(self.active))
        self.step()

    def step(self):
        self.calls += 1
        for state in self.active:
            state.left -= 1
            state.finish = "stop" if state.left == 0 else None
        self.active = [state for state in self.active if state.left]


def steps_of(number, groups):
    """A work that asks its groups one after the other, each request a group of its own, one question long."""
    for lengths in groups:
        yield [Group([SimpleNamespace(left=left, finish=None)], 1) for left in lengths]
    return number


@given(
    st.lists(st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=2), max_size=12),
    st.integers(1, 5),
)
def test_all_works_are_done_in_the_room_there_is_and_none_is_left(works, room):
    rows, ended = Lengths(), []
    schedule = Schedule(rows, room, room, lambda: ended.append(1))
    made = (Work(steps_of(number, groups)) for number, groups in enumerate(works))
    assert schedule.results(made) == list(range(len(works))) and len(ended) == len(works)
    assert rows.most <= room and not rows.active and not schedule.waiting


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 5))
def test_a_request_begins_as_soon_as_there_is_room(lengths, room):
    """Single requests are done after at most their sum over the room and the longest, the bound of any such list."""
    alone, rows = Lengths(), Lengths()
    for rows_, size in ((rows, room), (alone, 1)):
        works = (Work(steps_of(number, [[left]])) for number, left in enumerate(lengths))
        Schedule(rows_, size, size, lambda: None).results(works)
    assert alone.calls == sum(lengths)
    assert rows.calls <= sum(lengths) / room + max(lengths)  # (an `add` here gives all rows a token, as a step does)


@given(st.integers(0, 9), st.integers(1, 3))
def test_ahead_gives_what_map_gives(count, most):
    assert list(ahead(str, range(count), most)) == list(map(str, range(count)))
