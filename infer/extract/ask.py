"""A note's questions as prompts, and the answers to all notes of a batch: infer.extract between its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infer import tasks
from infer.engine.generate import Generator
from infer.engine.settings import Generation, Settings
from infer.extract.answers import diagnosis_record, kept_logprobs, phenotype_record
from infer.extract.grounded import Grounded, Grounding
from infer.extract.notes import Note
from infer.retrieval.neighbours import Neighbours
from model.support.cli import UserError
from model.text.tokenizer import to_characters

FORMS = ("template", "chat")
LONG = ("error", "truncate", "windows")
# How an untuned model is asked, after the note, in its own chat form.
CHAT_PHENOTYPE = (
    "{question} Answer with the value only, several separated by commas{values}. "
    'If the note does not say, answer "not relevant".'
)
CHAT_DIAGNOSIS = "{question} Answer with the ICD-10-CM description and its code in brackets only."
CHAT_OTHER = (
    '{question} Answer with the values only, separated by commas. If the note does not say, answer "not relevant".'
)


@dataclass(frozen=True)
class Limits:
    """The paper's limits: tokens of a prompt (note and question), new tokens of an answer."""

    input: int = 1500
    phenotype: int = 50
    diagnosis: int = 500


@dataclass(frozen=True)
class Part:
    """A stretch of a note that is asked by itself; `done` says how it came from a note beyond the limit, `around` what
    the note has before and after it: two characters, which tell a word or number that was cut."""

    note: Note
    text: str
    done: dict[str, Any] | None = None
    around: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Request:
    """A question about a part. `rooms`: in how many of a plan's questions (tasks.QUESTION tokens) it has room."""

    prompt: list[int]
    settings: Settings
    rooms: int = 1


class Asker:
    """Puts a task's questions about notes to a Generator, in one form; those of `batch` notes at once."""

    def __init__(
        self, generator: Generator, task: str, form: str, limits: Limits, long: str = "error", grounded: bool = False,
        neighbours: Neighbours | None = None, batch: int = 8,
    ) -> None:  # fmt: skip
        self.generator, self.tokenizer = generator, generator.tokenizer
        longest = limits.phenotype if task == "phenotype" else max(limits.phenotype, limits.diagnosis)
        length = generator.engine.config.max_position_embeddings
        limits = replace(limits, input=min(limits.input, length - longest))  # what the model can take
        self.task, self.form, self.limits, self.long, self.neighbours = task, form, limits, long, neighbours
        self.batch = batch
        self.grounding = Grounding(self.tokenizer, generator.stop_ids) if grounded else None
        if form == "chat" and self.tokenizer.form is None:
            raise UserError("the tokenizer does not say its chat form; ask with --form template")
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

    def prompt(self, text: str, name: str, question: str, shown: Sequence[str] = ()) -> list[int]:
        """`shown`: other notes with their diagnoses, between the note and the question."""
        if self.form == "template":
            pieces = [self.tokenizer.encode(piece) for piece in (*shown, tasks.branch(question))]
            return [*self.tokenizer.encode(tasks.prefix(text), bos=True), *(i for piece in pieces for i in piece)]
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

    def beside(self, note: Note, text: str, question: str) -> list[tuple[str, str]]:
        """(id, text) of the neighbours shown with a note's diagnosis question, as many as the limit leaves room for."""
        if self.neighbours is None:
            return []
        found = self.neighbours.of({"id": note.id, "text": note.text, "patient": note.patient})
        room = self.limits.input - len(self.prompt(text, "diagnosis", question))
        parts = self.neighbours.shown(self.tokenizer, found, room)
        while parts and len(self.prompt(text, "diagnosis", question, [t for _, t in parts])) > self.limits.input:
            parts.pop()  # a chat's pieces are encoded together and may take a token more than apart
        return parts

    def parts(self, note: Note) -> list[Part]:
        """The note, or what `long` makes of one beyond the limit. Raises UserError where that is "error"."""
        over = max(len(self.prompt(note.text, *asked)) for asked in self.questions(note)) - self.limits.input
        if over <= 0:
            return [Part(note, note.text)]
        tokens = len(self.tokenizer.encode(note.text))
        if self.long == "error":
            raise UserError(
                f"the note is too long by {over} tokens (limit {self.limits.input}); "
                "--long truncate or --long windows reads it"
            )
        size = tokens - over - 8  # a cut text may take a few tokens more than it had
        if size < 16:
            raise UserError(f"the limit of {self.limits.input} tokens leaves no room for the note")
        _, spans = self.tokenizer.encode(note.text, offsets=True)
        letters = to_characters(note.text, spans)
        if self.long == "truncate":
            starts, done = [0], {"did": "truncate", "tokens": tokens, "read": size}
        else:
            step = max(1, size * 3 // 4)  # a quarter of each window overlaps the one before
            starts = [*range(0, max(1, tokens - size), step), max(0, tokens - size)]
            done = {"did": "windows", "tokens": tokens, "windows": len(starts), "size": size}
        parts = []
        for start in dict.fromkeys(starts):
            begin, end = letters[start][0], letters[min(start + size, tokens) - 1][1]
            around = note.text[max(0, begin - 2) : begin], note.text[end : end + 2]
            parts.append(Part(note, note.text[begin:end], done, around))
        return parts

    def records(self, notes: Sequence[Note]) -> list[dict[str, Any]]:
        """One record a note, in order; what is wrong with a note becomes its record's `error`."""
        records: list[dict[str, Any]] = []
        places: list[tuple[dict[str, Any], list[Part]]] = []
        for note in notes:
            records.append({"id": note.id})
            try:
                if note.error is not None:
                    raise UserError(note.error)
                places.append((records[-1], self.parts(note)))
            except UserError as error:
                records[-1]["error"] = str(error)
        asked = (self.requests(part, record) for record, parts in places for part in parts)
        outs = (out for requests in self.slices(asked) for out in self.answers(requests))
        for record, parts in places:
            questions = self.questions(parts[0].note)
            record |= self.record(parts, questions, [[next(outs) for _ in questions] for _ in parts])
        return records

    def requests(self, part: Part, record: dict[str, Any]) -> list[Request]:
        """Everything that is asked about a part; the neighbours that it is shown enter its record."""
        grammars = self.grounding.of_note(part.text, part.around) if self.grounding else {}
        requests = []
        for name, question in self.questions(part.note):
            shown = self.beside(part.note, part.text, question) if name == "diagnosis" else []
            if name == "diagnosis" and self.neighbours is not None:
                held = record.setdefault("neighbours", [])
                held += [one for one, _ in shown if one not in held]
            prompt = self.prompt(part.text, name, question, [text for _, text in shown])
            constraint = Grounded(grammars[name]) if grammars else None
            rooms = 1 if name else -(-len(self.tokenizer.encode(question)) // tasks.QUESTION)
            chosen = self.wide if name == "diagnosis" else self.short
            requests.append(Request(prompt, replace(chosen, constraint=constraint), rooms))
        return requests

    def slices(self, asked: Iterable[list[Request]]) -> Iterator[list[Request]]:
        """The parts' requests in order, at once as many as `batch` notes with the task's questions have: so windows and
        own questions, however many, take no more memory. A part's stay together where they can: they share its text."""
        most = self.batch * len(self.questions(Note("")))
        held: list[Request] = []
        parts = rooms = 0
        for requests in asked:
            if held and (parts == self.batch or rooms + sum(request.rooms for request in requests) > most):
                yield held
                held, parts, rooms = [], 0, 0
            parts += 1
            for request in requests:
                if held and rooms + request.rooms > most:
                    yield held
                    held, parts, rooms = [], 1, 0
                held.append(request)
                rooms += request.rooms
        if held:
            yield held

    def answers(self, requests: list[Request]) -> list[Generation]:
        settings = [request.settings for request in requests]
        found = self.generator.generate([request.prompt for request in requests], settings)
        return [whole(out, chosen) for out, chosen in zip(found, settings, strict=True)]

    def record(
        self, parts: list[Part], asked: list[tuple[str, str]], answers: list[list[Generation]]
    ) -> dict[str, Any]:
        """The answers to one note's questions, merged over its parts."""
        note, record = parts[0].note, {}
        for place, (name, question) in enumerate(asked):
            outs = [of_part[place] for of_part in answers]
            if name == "diagnosis":
                record["diagnosis"] = best_diagnosis(outs, self.generator.decode)
                continue
            merged = merge([phenotype_record(out, note.text, self.generator.decode) for out in outs])
            if name:
                record.setdefault("phenotypes", {})[name] = merged
            else:
                record.setdefault("answers", []).append({"question": question, **merged})
        flat = [out for of_part in answers for out in of_part]
        record["tokens"] = {
            "note": len(self.tokenizer.encode(note.text)),
            "prompt": sum(out.prompt_tokens for out in flat),
            "new": sum(len(out.tokens) for out in flat),
        }
        if parts[0].done:
            record["long"] = parts[0].done
        return record


def whole(out: Generation, settings: Settings) -> Generation:
    """A grounded answer that was cut short keeps only what is whole of it."""
    if settings.constraint is None:
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
            held = best.setdefault(answer["text"], answer)
            if answer["logprob"] > held["logprob"]:
                best[answer["text"]] = answer
    reasons = [record["finish_reason"] for record in records]
    others = [reason for reason in reasons if reason != "stop"]
    reason = next((reason for reason in others if reason != "stop_string"), next(iter(others), "stop"))
    not_relevant = not best and all(record["not_relevant"] for record in records)
    merged = {"answers": list(best.values()), "not_relevant": not_relevant, "finish_reason": reason}
    if not best and not not_relevant:
        merged["raw"] = next(record["raw"] for record in records if "raw" in record)
    return merged
