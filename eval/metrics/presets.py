"""The presets: for each metric, how answers are tokenized and whose definition is used.

| preset | exact match compares | BLEU-2 | ROUGE-L |
| --- | --- | --- | --- |
| clinical | clinical form | sacrebleu's, on clinical words | COCO's, on clinical words |
| cancerllm | released form (stemmed) | COCO's, on stemmed words | COCO's, on stemmed words |
| cancerllm-released | released form (stemmed) | none (the script has it commented out) | ROUGE-1 over sets of stems |
| coco | text, whitespace collapsed | COCO's, split at whitespace | COCO's, split at each space |
| sacrebleu | text, whitespace collapsed | sacrebleu's, 13a words | COCO's, 13a words |
| nltk | text, whitespace collapsed | nltk's, split at whitespace | COCO's, split at whitespace |
| rouge_score | text, whitespace collapsed | COCO's, rouge_score's words | rouge_score's |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import eval.metrics.pairs as pairs
import eval.metrics.text as text
from model.support.cli import UserError, nearest

Words = list[str]


@dataclass(frozen=True)
class Preset:
    """The definitions that one public scorer (or ours) uses."""

    name: str
    form: Callable[[str], str]
    """Normalization for exact match."""
    words: Callable[[str], Words]
    """Tokenization for BLEU, and for ROUGE unless `rouge_words` is given."""
    bleu: Callable[[Words, Words], float] | None
    """BLEU-2 of two answers; None: not computed."""
    rouge: Callable[[Words, Words], float]
    choices: str
    """All choices of the preset, in the form of a sacrebleu signature."""
    rouge_words: Callable[[str], Words] | None = None
    nothing: str | None = None
    """The phrase that counts as no answer; None: no phrase does."""
    separator: str = ","
    """A regular expression at which a text is split into answers."""
    splits_lists: bool = False
    """Split the items of a list too, not only a text."""
    version: int = 1

    @property
    def signature(self) -> str:
        """Printed with every score; `chosen` accepts it in place of a name."""
        return f"preset:{self.name}|{self.choices}|v:{self.version}"


def folded(answer: str) -> str:
    return " ".join(answer.split())


def _clinical(answer: str) -> Words:
    return text.clinical(answer).split()


def _stemmed(answer: str) -> Words:
    return text.released(answer).split()


def _at_each_space(answer: str) -> Words:
    return answer.split(" ")


_RULES = "dedup,max-match|avg:macro"
_SETS = f"set:comma-split,{_RULES}"
_ALL = (
    Preset(
        "clinical",
        text.clinical,
        _clinical,
        pairs.bleu_sacrebleu,
        pairs.rouge_l_coco,
        "em:clinical|bleu:2,eff:yes,smooth:exp,tok:clinical|rouge:L,beta:1.2,tok:clinical|none:not relevant|"
        f"set:semicolon-split,{_RULES}",
        nothing="not relevant",
        separator=r";+(?=\s|$)",
        splits_lists=True,
        version=2,
    ),
    Preset(
        "cancerllm",
        text.released,
        _stemmed,
        pairs.bleu_coco,
        pairs.rouge_l_coco,
        f"em:lower,nopunct,porter|bleu:2,coco,tok:porter|rouge:L,beta:1.2,tok:porter|{_SETS}",
    ),
    Preset(
        "cancerllm-released",
        text.released,
        _stemmed,
        None,
        pairs.rouge_1_sets,
        f"em:lower,nopunct,porter|bleu:none|rouge:1,sets,tok:porter|{_SETS}",
    ),
    Preset(
        "coco",
        folded,
        str.split,
        pairs.bleu_coco,
        pairs.rouge_l_coco,
        f"em:text|bleu:2,coco,tok:space|rouge:L,beta:1.2,tok:space|{_SETS}",
        rouge_words=_at_each_space,
    ),
    Preset(
        "sacrebleu",
        folded,
        text.words_13a,
        pairs.bleu_sacrebleu,
        pairs.rouge_l_coco,
        f"em:text|bleu:2,nrefs:1,case:mixed,eff:yes,tok:13a,smooth:exp|rouge:L,beta:1.2,tok:13a|{_SETS}",
    ),
    Preset(
        "nltk",
        folded,
        str.split,
        pairs.bleu_nltk,
        pairs.rouge_l_coco,
        f"em:text|bleu:2,nltk,smooth:method0,tok:space|rouge:L,beta:1.2,tok:space|{_SETS}",
    ),
    Preset(
        "rouge_score",
        folded,
        text.words_rouge,
        pairs.bleu_coco,
        pairs.rouge_l_google,
        f"em:text|bleu:2,coco,tok:rouge_score|rouge:L,beta:1,tok:rouge_score,stem:no|{_SETS}",
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def chosen(name: str) -> Preset:
    """The preset with this name or signature. Raises UserError if there is none, or if the signature differs from that
    of the preset as it is now."""
    known = name.removeprefix("preset:").split("|")[0]
    if known not in PRESETS:
        raise UserError(f"no preset {known!r}{nearest(known, list(PRESETS))}; the presets are {', '.join(PRESETS)}")
    if known != name and name != PRESETS[known].signature:
        raise UserError(f"the signature {name} cannot be reproduced here; the preset is now {PRESETS[known].signature}")
    return PRESETS[known]
