"""From notes to records: build each question's prompt, generate the answers in batches, find where they were read.

A note goes through these steps of `Asker`:

    parts       the whole note, or its windows if it is too long, each with the prompts of its questions
    requests    generation settings per prompt, with a grammar if decoding is grounded
    generation  all requests of up to `batch` notes at once (schedule.py); the note is prefilled once for all questions
    places      where in the note each value was read; repeated values are resolved by further requests (evidence.py)
    record      values, spans, log-probabilities and codes, merged over windows (answers.py)
    others      if asked for, the likeliest other answer to each question (alternatives.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Generator as Steps
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from infer import tasks
from infer.engine.generate import Generator, RequestBatch
from infer.engine.settings import Generation, Settings
from infer.extract.alternatives import alternative, second_choices
from infer.extract.answers import best_diagnosis, calibrate, merge, phenotype_record, written_values
from infer.extract.evidence import Reading, decide, hiding, losses
from infer.extract.grounded import Grounded, Grounding
from infer.extract.notes import Note, skip_reason
from infer.extract.places import Span, edges, occurrences
from infer.extract.schedule import Group, Schedule, Work, ahead
from infer.retrieval.neighbours import Neighbours
from infer.retrieval.repair import Repair
from infer.retrieval.repaired_note import repair_note
from model.support.cli import UserError
from model.text.tokenizer import Tokenizer, to_characters

FORMS = ("template", "chat")
LONG = ("error", "truncate", "windows")
# Questions for an untuned model, in its own chat template; they follow the note.
CHAT_PHENOTYPE = (
    "{question} Answer with the value only, several separated by semicolons{values}. "
    'If the note does not say, answer "not relevant".'
)
CHAT_DIAGNOSIS = "{question} Answer with the ICD-10-CM description and its code in brackets only."
CHAT_OTHER = (
    '{question} Answer with the values only, separated by semicolons. If the note does not say, answer "not relevant".'
)


@dataclass(frozen=True)
class Limits:
    """Maximum number of tokens of a prompt (note and question) and of the two kinds of answers; the paper's values."""

    input: int = 1500
    phenotype: int = 50
    diagnosis: int = 500


@dataclass(frozen=True)
class Part:
    """A whole note, or one window of a long one, with the prompts of its questions."""

    note: Note
    text: str
    prompts: list[list[int]]
    note_tokens: int
    """Number of tokens of the whole note."""
    start: int = 0
    """Offset of `text` in the note, in characters."""
    long: dict[str, Any] | None = None
    """The record's `long` entry, if the note is over the limit."""

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Request:
    """A question about a part."""

    prompt: list[int]
    settings: Settings
    questions: int = 1
    """Size of the question in units of tasks.QUESTION tokens, by which memory is planned."""


@dataclass(frozen=True)
class Answer:
    """The generated answer to one question about a part."""

    part: Part
    name: str
    question: str
    out: Generation


def form_for(tokenizer: Tokenizer, adapters: Sequence[str | Path]) -> str:
    """ "template" if the model has adapters or no chat template of its own, else "chat"."""
    return "template" if adapters or tokenizer.form is None else "chat"


class Asker:
    """Asks a task's questions about notes, `batch` notes at a time.

    `form` is "template" (tasks.py) or "chat" (the model's chat template); `long` says what to do with notes over the
    limit (see LONG); `grounded` constrains decoding (grounded.py); `neighbours` adds retrieved notes to the diagnosis
    question; `repair` corrects a note's spelling first; `temperatures` are the adapter's calibration; `alternatives`
    other answers are sought for each question of a note that is read whole.
    """

    def __init__(
        self,
        generator: Generator,
        task: str,
        form: str,
        limits: Limits,
        long: str = "error",
        grounded: bool = False,
        neighbours: Neighbours | None = None,
        batch: int = 8,
        repair: Repair | None = None,
        temperatures: Mapping[str, float] | None = None,
        alternatives: int = 0,
    ) -> None:
        self.temperatures = temperatures or {}
        self.generator, self.tokenizer = generator, generator.tokenizer
        longest = limits.phenotype if task == "phenotype" else max(limits.phenotype, limits.diagnosis)
        length = generator.max_length
        limits = replace(limits, input=min(limits.input, length - longest))
        self.task, self.form, self.limits, self.long, self.neighbours = task, form, limits, long, neighbours
        self.batch, self.repair, self.alternatives = batch, repair, alternatives
        self.grounding = Grounding(self.tokenizer, generator.stop_ids, generator.engine.device) if grounded else None
        if form == "chat" and self.tokenizer.form is None:
            raise UserError("the model has no chat template, so no chat form; ask with --form template")
        question = max(len(self.prompt("", *asked)) for asked in self.questions(Note("")))
        if length - longest <= question:
            option = "--max-new-tokens" if longest == limits.phenotype else "--max-new-diagnosis"
            raise UserError(
                f"{option} {longest} leaves no room for a note: a question takes {question} tokens and the model's "
                f"length is {length}; ask for fewer new tokens"
            )
        stop = ("\n",) if form == "template" else ()
        self.settings = Settings(
            max_new_tokens=limits.phenotype, stop=stop, stop_cycles=True, runner_up=alternatives > 0
        )
        self.diagnosis_settings = replace(self.settings, max_new_tokens=limits.diagnosis)

    @property
    def max_questions(self) -> int:
        """Number of questions that may be generated at once."""
        return self.batch * len(self.questions(Note("")))

    def questions(self, note: Note) -> list[tuple[str, str]]:
        """(name, question) of each question about a note. A note's own questions have the name ""."""
        if note.questions:
            return [("", question) for question in note.questions]
        asked = []
        if self.task != "diagnosis":
            asked += [(name, phenotype.question) for name, phenotype in tasks.PHENOTYPES.items()]
        if self.task != "phenotype":
            asked.append(("diagnosis", tasks.DIAGNOSIS_QUESTION))
        return asked

    def prompt(
        self, text: str, name: str, question: str, shown: Sequence[str] = (), prefix: list[int] | None = None
    ) -> list[int]:
        """Token ids of the prompt that asks one question about a text.

        `shown` are retrieved examples (tasks.example), placed between note and question. `prefix` may give the ids of
        tasks.prefix(text) with the begin token, so that they are not encoded again; only "template" uses them.
        """
        if self.form == "template":
            if prefix is None:
                prefix = self.tokenizer.encode(tasks.prefix(text), bos=True)
            pieces = [self.tokenizer.encode(piece) for piece in (*shown, tasks.branch(question))]
            return [*prefix, *(i for piece in pieces for i in piece)]
        if name == "diagnosis":
            asked = CHAT_DIAGNOSIS.format(question=question)
        elif name:
            values = tasks.PHENOTYPES[name].values
            among = f" (of: {', '.join(values)})" if values else ""
            asked = CHAT_PHENOTYPE.format(question=question, values=among)
        else:
            asked = CHAT_OTHER.format(question=question)
        content = "".join((tasks.prefix(text), *shown, asked))
        return self.tokenizer.encode_chat([{"role": "user", "content": content}])

    def prompts(self, note: Note, text: str, prefix: list[int] | None = None) -> list[list[int]]:
        """The prompts of all of a note's questions about a text. "template" encodes the text once, "chat" once per
        question."""
        if prefix is None and self.form == "template":
            prefix = self.tokenizer.encode(tasks.prefix(text), bos=True)
        return [self.prompt(text, name, question, prefix=prefix) for name, question in self.questions(note)]

    def with_neighbours(self, note: Note, text: str, bare: list[int]) -> tuple[list[int], list[str]]:
        """The diagnosis prompt with as many retrieved neighbours as the limit allows, and the neighbours' ids. `bare`
        is the prompt without them."""
        assert self.neighbours is not None
        question = tasks.DIAGNOSIS_QUESTION
        prefix = bare[: len(bare) - len(self.tokenizer.encode(tasks.branch(question)))]
        found = self.neighbours.of({"id": note.id, "text": note.text, "patient": note.patient})
        shown = self.neighbours.shown(self.tokenizer, found, self.limits.input - len(bare))
        while True:
            prompt = self.prompt(text, "diagnosis", question, [example for _, example in shown], prefix)
            if not shown or len(prompt) <= self.limits.input:
                return prompt, [name for name, _ in shown]
            shown.pop()  # a chat message is encoded as a whole, which may take a few tokens more

    def parts(self, note: Note) -> list[Part]:
        """The whole note, or its beginning or windows if it is over the limit. Raises UserError for a note over the
        limit if `long` is "error"."""
        prefix, spans = self.encoded(note.text)
        tokens = len(spans)
        prompts = self.prompts(note, note.text, prefix)
        excess = max(map(len, prompts)) - self.limits.input
        if excess <= 0:
            return [Part(note, note.text, prompts, tokens)]
        if self.long == "error":
            raise UserError(
                f"the note is too long by {excess} tokens (limit {self.limits.input}); "
                "--long truncate or --long windows reads it"
            )
        size = tokens - excess - 8  # a window may take a few tokens more by itself than within the note
        if size < 16:
            raise UserError(f"the limit of {self.limits.input} tokens leaves no room for the note")
        if self.long == "truncate":
            starts, long = [0], {"did": "truncate", "tokens": tokens, "read": size}
        else:  # windows overlap by a quarter; the last one ends where the note ends
            starts = [*range(0, tokens - size, size * 3 // 4), tokens - size]
            long = {"did": "windows", "tokens": tokens, "windows": len(starts), "size": size}
        parts = []
        for first in starts:
            start, end = spans[first][0], spans[first + size - 1][1]
            text = note.text[start:end]
            parts.append(Part(note, text, self.prompts(note, text), tokens, start, long))
        return parts

    def encoded(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of tasks.prefix(text), and the span of `text` (in characters) of each token of the text itself."""
        prefix, spans = self.tokenizer.encode(tasks.prefix(text), bos=True, offsets=True)
        first = len(text) - len(text.lstrip())
        last, shift = first + len(text.strip()), first - len(tasks.NOTE)
        within = [
            (max(start + shift, first), min(end + shift, last))
            for start, end in to_characters(tasks.prefix(text), spans)
        ]
        return prefix, [(start, end) for start, end in within if start < end]

    def records(self, notes: Iterable[Note], ended: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
        """One record per note, in order; a note that cannot be answered gets a record with an `error`. `ended` is
        called each time a record is complete."""
        return self.results(ahead(lambda note: Work(self.work(note)), notes, self.batch), ended)

    def results(self, works: Iterable[Work], ended: Callable[[], object] = lambda: None) -> list[Any]:
        """Results of all works, in order, running `batch` notes at a time."""
        return Schedule(RequestBatch(self.generator), self.batch, self.max_questions, ended).results(iter(works))

    def work(self, note: Note) -> Steps[list[Group], None, dict[str, Any]]:
        """Coroutine that answers one note: yields requests to be generated (see Work), returns the record."""
        if self.repair is None:
            return (yield from self.answered(note))
        repaired, original = repair_note(note, self.repair)
        return original.restore((yield from self.answered(repaired)))

    def answered(self, note: Note) -> Steps[list[Group], None, dict[str, Any]]:
        """As `work`, for a note that needs no repair."""
        record: dict[str, Any] = {"id": note.id}
        try:
            if reason := skip_reason(note):
                raise UserError(reason)
            parts = self.parts(note)
            groups_of_parts = [self.groups(self.requests(part, record)) for part in parts]
        except UserError as error:
            return {"id": note.id, "error": str(error)}
        yield [group for groups in groups_of_parts for group in groups]
        answers = [
            [
                Answer(part, name, question, out)
                for (name, question), out in zip(self.questions(note), self.outs(groups), strict=True)
            ]
            for part, groups in zip(parts, groups_of_parts, strict=True)
        ]
        places = iter((yield from self.places([answer for of_part in answers for answer in of_part])))
        record |= self.record(answers, [[next(places) for _ in of_part] for of_part in answers])
        if self.alternatives and len(parts) == 1 and not parts[0].long:
            yield from self.add_alternatives(record, answers[0], groups_of_parts[0])
        return record

    def add_alternatives(
        self, record: dict[str, Any], answers: Sequence[Answer], groups: Sequence[Group]
    ) -> Steps[list[Group], None, None]:
        """Adds to each answer of a record the likeliest other ones (alternatives.py); `groups` holds its requests.

        One alternative of each question is generated at a time, in the questions' groups, so that memory is that of the
        answers themselves.
        """
        of_groups = [
            [second_choices(self.generator, state, self.alternatives) for state in group.states] for group in groups
        ]
        for n in range(max((len(found) for of_group in of_groups for found in of_group), default=0)):
            round_ = [
                Group([one for found in of_group for one in found[n : n + 1] if one.finish is None], group.questions)
                for group, of_group in zip(groups, of_groups, strict=True)
            ]
            yield [group for group in round_ if group.states]
        own = iter(record.get("answers", ()))
        others = [found for of_group in of_groups for found in of_group]
        for answer, of_answer in zip(answers, others, strict=True):
            outs = [without_partial_value(self.generator.result(one), one.settings) for one in of_answer]
            found = [alternative(self.generator, answer.name, out) for out in (answer.out, *outs)]
            entry = record["diagnosis"] if answer.name == "diagnosis" else record.get("phenotypes", {}).get(answer.name)
            best_last = sorted(found[1:], key=lambda one: one["logprob"])  # of equal texts the likeliest stays
            different = {one["text"]: one for one in best_last if one["text"] not in ("", found[0]["text"])}
            (entry or next(own))["alternatives"] = sorted(different.values(), key=lambda one: -one["logprob"])

    def requests(self, part: Part, record: dict[str, Any]) -> list[Request]:
        """One request per question about a part. The ids of retrieved neighbours are added to `record`."""
        grammars = {}
        if self.grounding:  # edges of the whole note: at a window's border a word or number may be cut
            at = (n - part.start for n in edges(part.note.text))
            grammars = self.grounding.of_note(part.text, [n for n in at if 0 <= n <= len(part.text)])
        requests = []
        for (name, question), prompt in zip(self.questions(part.note), part.prompts, strict=True):
            if name == "diagnosis" and self.neighbours is not None:
                prompt, shown = self.with_neighbours(part.note, part.text, prompt)
                listed = record.setdefault("neighbours", [])
                listed += [one for one in shown if one not in listed]
            constraint = Grounded(grammars[name]) if grammars else None
            if constraint is not None:
                constraint.allowed([])  # memoize the first mask, the most expensive, while other notes are generated
            questions = 1 if name else -(-len(self.tokenizer.encode(question)) // tasks.QUESTION)
            settings = self.diagnosis_settings if name == "diagnosis" else self.settings
            requests.append(Request(prompt, replace(settings, constraint=constraint), questions))
        return requests

    def groups(self, requests: Iterable[Request]) -> list[Group]:
        """Splits the requests about one text, in order, into groups of at most `max_questions`, so that a note with
        many questions of its own takes no more memory than a task's questions."""
        groups: list[Group] = []
        for request in requests:
            if not groups or groups[-1].questions + request.questions > self.max_questions:
                groups.append(Group([], 0))
            groups[-1].states += self.generator.states([request.prompt], [request.settings], {})
            groups[-1].questions += min(request.questions, self.max_questions)  # a longer one gets its own group
        return groups

    def outs(self, groups: Iterable[Group]) -> list[Generation]:
        """The generated answers of finished groups, in order."""
        states = [state for group in groups for state in group.states]
        return [without_partial_value(self.generator.result(state), state.settings) for state in states]

    def places(self, answers: Sequence[Answer]) -> Steps[list[Group], None, list[list[list[Span]]]]:
        """The spans of the note for every value of every answer (evidence.py): first the one where the value was read,
        then those that cannot be ruled out. [] for a diagnosis, which is not a span of the note."""
        readings = [self.readings(answer) if answer.name != "diagnosis" else [] for answer in answers]
        repeated = [reading for of_answer in readings for reading in of_answer if reading.is_open]
        measured = iter((yield from self.losses(repeated)))
        return [
            [decide(reading.spans, next(measured)) if reading.is_open else reading.spans for reading in of_answer]
            for of_answer in readings
        ]

    def losses(self, readings: Sequence[Reading]) -> Steps[list[Group], None, list[list[float]]]:
        """For each reading, the log-probability (nats) that its value loses when each of its spans is hidden."""
        groups = []
        for _, of_part in groupby(readings, lambda reading: reading.start):
            token_counts: dict[int, int] = {}
            groups += self.groups(
                Request(prompt, settings)
                for reading in of_part
                for prompt, settings in hiding(self.generator, reading, token_counts)
            )
        yield groups
        outs = iter(self.outs(groups))
        return [losses(reading, [next(outs) for _ in reading.spans], self.generator.decode) for reading in readings]

    def readings(self, answer: Answer) -> list[Reading]:
        """Each value of an answer with the spans where it may have been read."""
        part, prompt = answer.part, partial(self.prompt, name=answer.name, question=answer.question)
        return [
            Reading(prompt, part.text, part.start, answer.out, span, candidates(answer, value))
            for value, span in written_values(answer.out.text)
        ]

    def record(self, answers: list[list[Answer]], places: list[list[list[list[Span]]]]) -> dict[str, Any]:
        """A note's record from the answers of each of its parts and the places of their values."""
        record: dict[str, Any] = {}
        decode = self.generator.decode
        for of_question, spans in zip(zip(*answers, strict=True), zip(*places, strict=True), strict=True):
            name, question = of_question[0].name, of_question[0].question
            outs = [answer.out for answer in of_question]
            if name == "diagnosis":
                record["diagnosis"] = best_diagnosis(outs, decode)
                continue
            merged = merge([phenotype_record(out, at, decode) for out, at in zip(outs, spans, strict=True)])
            if name:
                record.setdefault("phenotypes", {})[name] = merged
            else:
                record.setdefault("answers", []).append({"question": question, **merged})
        calibrate(record, self.temperatures)
        part, flat = answers[0][0].part, [answer.out for of_part in answers for answer in of_part]
        record["tokens"] = {
            "note": part.note_tokens,
            "prompt": sum(out.prompt_tokens for out in flat),
            "new": sum(len(out.tokens) for out in flat),
        }
        if part.long:
            record["long"] = part.long
        return record


def candidates(answer: Answer, value: str) -> list[Span]:
    """The spans of a part of a note at which a value occurs, ignoring case if it does not occur as written. Case is
    always ignored for values of a closed list, which are written in the list's case, not the note's."""
    part, known = answer.part, tasks.PHENOTYPES.get(answer.name)
    closed = known is not None and bool(known.values)
    for ignore_case in (True,) if closed else (False, True):
        spans = occurrences(value, part.note.text, ignore_case)
        if inside := [(start, end) for start, end in spans if part.start <= start and end <= part.end]:
            return inside
    return []


def without_partial_value(out: Generation, settings: Settings) -> Generation:
    """Cuts a grounded answer that reached its token limit back to its last complete value."""
    if not isinstance(settings.constraint, Grounded):
        return out
    return replace(out, text=settings.constraint.grammar.longest_complete(out.text))
