"""A note's questions as prompts, and the answers to all notes of a batch: infer.extract between its files."""

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
from infer.extract.answers import calibrate, diagnosis_record, kept_logprobs, phenotype_record, written_values
from infer.extract.evidence import Reading, decide, hiding, losses
from infer.extract.grounded import Grounded, Grounding
from infer.extract.notes import Note, refusal
from infer.extract.places import Span, edges, occurrences
from infer.extract.schedule import Group, Schedule, Work, ahead
from infer.retrieval.neighbours import Neighbours
from infer.retrieval.repair import Repair
from infer.retrieval.repaired_note import repair_note
from model.support.cli import UserError
from model.text.tokenizer import Tokenizer, to_characters

FORMS = ("template", "chat")
LONG = ("error", "truncate", "windows")
# How an untuned model is asked, after the note, in its own chat form.
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
    """The paper's limits: tokens of a prompt (note and question), new tokens of an answer."""

    input: int = 1500
    phenotype: int = 50
    diagnosis: int = 500


@dataclass(frozen=True)
class Part:
    """A whole note, or one window of it: its characters from `start` on, with the prompts of its questions. `done` is
    the record's `long` entry of a note beyond the limit."""

    note: Note
    text: str
    prompts: list[list[int]]
    tokens: int
    """Of the whole note."""
    start: int = 0
    done: dict[str, Any] | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Request:
    """A question about a part. It is as long as so many of a plan's `questions` (tasks.QUESTION tokens each)."""

    prompt: list[int]
    settings: Settings
    questions: int = 1


@dataclass(frozen=True)
class Answer:
    """The generated answer to one question about a part."""

    part: Part
    name: str
    question: str
    out: Generation


def form_for(tokenizer: Tokenizer, adapters: Sequence[str | Path]) -> str:
    """How a model is asked: by our template with adapters or without a chat form of its own, else in that form."""
    return "template" if adapters or tokenizer.form is None else "chat"


class Asker:
    """Asks a Generator a task's questions about notes, in one form, `batch` notes at once."""

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
    ) -> None:
        self.temperatures = temperatures or {}  # of the adapter's calibration
        self.generator, self.tokenizer = generator, generator.tokenizer
        longest = limits.phenotype if task == "phenotype" else max(limits.phenotype, limits.diagnosis)
        length = generator.max_length
        limits = replace(limits, input=min(limits.input, length - longest))  # what the model can take
        self.task, self.form, self.limits, self.long, self.neighbours = task, form, limits, long, neighbours
        self.batch, self.repair = batch, repair
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
        self.short = Settings(max_new_tokens=limits.phenotype, stop=stop, stop_cycles=True)
        self.wide = replace(self.short, max_new_tokens=limits.diagnosis)

    @property
    def at_once(self) -> int:
        """How many questions are asked at once."""
        return self.batch * len(self.questions(Note("")))

    def questions(self, note: Note) -> list[tuple[str, str]]:
        """(name, question) for everything that is asked about a note; its own questions have no name."""
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
        """The ids of one question about a text. `shown`: other notes with their diagnoses, between the two. `prefix`:
        the ids of tasks.prefix(text) with the begin token, where they are known (the template alone uses them)."""
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
        """The prompt of each of a note's questions about a text, which is encoded once (in a chat once a question)."""
        if prefix is None and self.form == "template":
            prefix = self.tokenizer.encode(tasks.prefix(text), bos=True)
        return [self.prompt(text, name, question, prefix=prefix) for name, question in self.questions(note)]

    def with_neighbours(self, note: Note, text: str, bare: list[int]) -> tuple[list[int], list[str]]:
        """The diagnosis prompt `bare` with the note's neighbours before its question, as many as the limit allows, and
        their ids."""
        assert self.neighbours is not None
        question = tasks.DIAGNOSIS_QUESTION
        prefix = bare[: len(bare) - len(self.tokenizer.encode(tasks.branch(question)))]
        found = self.neighbours.of({"id": note.id, "text": note.text, "patient": note.patient})
        shown = self.neighbours.shown(self.tokenizer, found, self.limits.input - len(bare))
        while True:
            prompt = self.prompt(text, "diagnosis", question, [example for _, example in shown], prefix)
            if not shown or len(prompt) <= self.limits.input:
                return prompt, [name for name, _ in shown]
            shown.pop()  # a chat's content is encoded as one text, which may take a token more

    def parts(self, note: Note) -> list[Part]:
        """The note, or what `long` makes of one beyond the limit. Raises UserError where that is "error"."""
        prefix, spans = self.encoded(note.text)
        tokens = len(spans)
        prompts = self.prompts(note, note.text, prefix)
        over = max(map(len, prompts)) - self.limits.input
        if over <= 0:
            return [Part(note, note.text, prompts, tokens)]
        if self.long == "error":
            raise UserError(
                f"the note is too long by {over} tokens (limit {self.limits.input}); "
                "--long truncate or --long windows reads it"
            )
        size = tokens - over - 8  # a cut text may take a few tokens more than it had
        if size < 16:
            raise UserError(f"the limit of {self.limits.input} tokens leaves no room for the note")
        if self.long == "truncate":
            starts, done = [0], {"did": "truncate", "tokens": tokens, "read": size}
        else:  # a quarter of each window overlaps the one before; the last ends with the note
            starts = [*range(0, tokens - size, size * 3 // 4), tokens - size]
            done = {"did": "windows", "tokens": tokens, "windows": len(starts), "size": size}
        parts = []
        for first in starts:
            start, end = spans[first][0], spans[first + size - 1][1]
            text = note.text[start:end]
            parts.append(Part(note, text, self.prompts(note, text), tokens, start, done))
        return parts

    def encoded(self, text: str) -> tuple[list[int], list[Span]]:
        """The ids of a note's prefix, and the characters of the note that each of its own tokens spells."""
        prefix, spans = self.tokenizer.encode(tasks.prefix(text), bos=True, offsets=True)
        first = len(text) - len(text.lstrip())
        last, shift = first + len(text.strip()), first - len(tasks.NOTE)
        within = [
            (max(start + shift, first), min(end + shift, last))
            for start, end in to_characters(tasks.prefix(text), spans)
        ]
        return prefix, [(start, end) for start, end in within if start < end]

    def records(self, notes: Iterable[Note], ended: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
        """One record a note, in order; what is wrong with a note becomes its record's `error`. `ended` is called for
        each."""
        return self.results(ahead(lambda note: Work(self.work(note)), notes, self.batch), ended)

    def results(self, works: Iterable[Work], ended: Callable[[], object] = lambda: None) -> list[Any]:
        """The works' results, `batch` notes and their questions at once."""
        return Schedule(RequestBatch(self.generator), self.batch, self.at_once, ended).results(iter(works))

    def work(self, note: Note) -> Steps[list[Group], None, dict[str, Any]]:
        """Answer a note: yields what it waits for, returns its record."""
        if self.repair is None:
            return (yield from self.answered(note))
        repaired, original = repair_note(note, self.repair)
        return original.restore((yield from self.answered(repaired)))

    def answered(self, note: Note) -> Steps[list[Group], None, dict[str, Any]]:
        """The record of a note that is read as it is."""
        record: dict[str, Any] = {"id": note.id}
        try:
            if reason := refusal(note):
                raise UserError(reason)
            parts = self.parts(note)
            asked = [self.groups(self.requests(part, record)) for part in parts]
        except UserError as error:
            return {"id": note.id, "error": str(error)}
        yield [group for of_part in asked for group in of_part]
        outs = [self.outs(of_part) for of_part in asked]
        answers = [
            [Answer(part, *question, out) for question, out in zip(self.questions(note), of_part, strict=True)]
            for part, of_part in zip(parts, outs, strict=True)
        ]
        places = iter((yield from self.places([answer for of_part in answers for answer in of_part])))
        return record | self.record(answers, [[next(places) for _ in of_part] for of_part in answers])

    def requests(self, part: Part, record: dict[str, Any]) -> list[Request]:
        """Everything that is asked about a part; the neighbours that it is shown enter its record."""
        grammars = {}
        if self.grounding:  # the edges are the whole note's, so that a part offers no part of a word or number
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
                constraint.allowed([])  # the first mask is the longest to make
            questions = 1 if name else -(-len(self.tokenizer.encode(question)) // tasks.QUESTION)
            chosen = self.wide if name == "diagnosis" else self.short
            requests.append(Request(prompt, replace(chosen, constraint=constraint), questions))
        return requests

    def groups(self, requests: Iterable[Request]) -> list[Group]:
        """Requests about one text in order, in groups of as many questions as are asked at once: so own questions,
        however many, take no more memory than a task's."""
        groups: list[Group] = []
        for request in requests:
            if not groups or groups[-1].questions + request.questions > self.at_once:
                groups.append(Group([], 0))
            groups[-1].states += self.generator.states([request.prompt], [request.settings], {})
            groups[-1].questions += min(request.questions, self.at_once)  # a longer one is asked alone
        return groups

    def outs(self, groups: Iterable[Group]) -> list[Generation]:
        states = [state for group in groups for state in group.states]
        return [whole(self.generator.result(state), state.settings) for state in states]

    def places(self, answers: Sequence[Answer]) -> Steps[list[Group], None, list[list[list[Span]]]]:
        """For every value of every answer the place in the note where it was read, then the others where it may have
        been (infer/extract/evidence.py); nothing for a diagnosis, which is no span of the note."""
        readings = [self.readings(answer) if answer.name != "diagnosis" else [] for answer in answers]
        open_ones = [one for of_answer in readings for one in of_answer if one.is_open]
        lost = iter((yield from self.losses(open_ones)))
        return [
            [decide(one.spans, next(lost)) if one.is_open else one.spans for one in of_answer] for of_answer in readings
        ]

    def losses(self, readings: Sequence[Reading]) -> Steps[list[Group], None, list[list[float]]]:
        """What the value of each reading loses without each of its places, in nats."""
        groups = []
        for _, of_part in groupby(readings, lambda reading: reading.start):
            tokens: dict[int, int] = {}
            groups += self.groups(Request(*how) for one in of_part for how in hiding(self.generator, one, tokens))
        yield groups
        outs = iter(self.outs(groups))
        return [losses(reading, [next(outs) for _ in reading.spans], self.generator.decode) for reading in readings]

    def readings(self, answer: Answer) -> list[Reading]:
        """Where each value of an answer may have been read."""
        part, prompt = answer.part, partial(self.prompt, name=answer.name, question=answer.question)
        return [
            Reading(prompt, part.text, part.start, answer.out, span, candidates(answer, value))
            for value, span in written_values(answer.out.text)
        ]

    def record(self, answers: list[list[Answer]], places: list[list[list[list[Span]]]]) -> dict[str, Any]:
        """The answers to one note's questions (of each of its parts), merged over its parts."""
        record: dict[str, Any] = {}
        for of_parts, spans in zip(zip(*answers, strict=True), zip(*places, strict=True), strict=True):
            name, question, outs = of_parts[0].name, of_parts[0].question, [answer.out for answer in of_parts]
            if name == "diagnosis":
                record["diagnosis"] = best_diagnosis(outs, self.generator.decode)
                continue
            decode = self.generator.decode
            merged = merge([phenotype_record(out, at, decode) for out, at in zip(outs, spans, strict=True)])
            if name:
                record.setdefault("phenotypes", {})[name] = merged
            else:
                record.setdefault("answers", []).append({"question": question, **merged})
        calibrate(record, self.temperatures)
        part, flat = answers[0][0].part, [answer.out for of_part in answers for answer in of_part]
        record["tokens"] = {
            "note": part.tokens,
            "prompt": sum(out.prompt_tokens for out in flat),
            "new": sum(len(out.tokens) for out in flat),
        }
        if part.done:
            record["long"] = part.done
        return record


def candidates(answer: Answer, value: str) -> list[Span]:
    """Where in its part of the note a value may have been read: as it is, else in another case. A closed list's values
    are written in the list's case, not the note's."""
    part, known = answer.part, tasks.PHENOTYPES.get(answer.name)
    closed = known is not None and bool(known.values)
    for ignore_case in (True,) if closed else (False, True):
        spans = occurrences(value, part.note.text, ignore_case)
        if inside := [(start, end) for start, end in spans if part.start <= start and end <= part.end]:
            return inside
    return []


def whole(out: Generation, settings: Settings) -> Generation:
    """A grounded answer that was cut short keeps only what is whole of it."""
    if not isinstance(settings.constraint, Grounded):
        return out
    return replace(out, text=settings.constraint.grammar.complete(out.text))


def best_diagnosis(outs: Sequence[Generation], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """The diagnosis of the window whose tokens were the likeliest, a mean each, and which window that was; one of which
    nothing is left only where that is so of all."""
    kept = [replace(out, logprobs=kept_logprobs(out, decode)) for out in outs]
    means = [(bool(out.text.strip()), sum(out.logprobs) / max(1, len(out.logprobs))) for out in kept]
    best = means.index(max(means))
    return diagnosis_record(kept[best]) | ({"window": best} if len(outs) > 1 else {})


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer out of several windows': values in order of appearance, each once, with its best log-probability; of
    the reasons to end the first that cut an answer short, else the first that is not the end token."""
    if len(records) == 1:
        return records[0]
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        for answer in record["answers"]:
            known = best.setdefault(answer["text"], answer)
            if answer["logprob"] > known["logprob"]:
                best[answer["text"]] = answer
    reasons = [record["finish_reason"] for record in records]
    others = [reason for reason in reasons if reason != "stop"]
    reason = next((reason for reason in others if reason != "stop_string"), next(iter(others), "stop"))
    not_relevant = not best and all(record["not_relevant"] for record in records)
    merged = {
        "answers": list(best.values()),
        "not_relevant": not_relevant,
        "logprob": min(record["logprob"] for record in records),
        "finish_reason": reason,
    }
    if not best and not not_relevant:
        merged["raw"] = next(record["raw"] for record in records if "raw" in record)
    return merged
