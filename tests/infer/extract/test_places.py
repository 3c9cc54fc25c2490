"""Where a span of a note may begin and end: words by Unicode's rules, numbers whole and with their signs."""

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.extract.places import edges, occurrences, occurs_in

# each line: the value, a bar, a note
PARTS = """
5 cm|2.5 cm
5 cm|nodule of .5 cm
05 cm|nodule .05 cm
5 cm|2 .5 cm
5 cm|2·5 cm
5 cm|2\u066b5 cm
2,5|12,5
200|1,200
205 g|1'205 g
205 g|1\u2019205 g
205 g|1\u202f205 g
205 g|1\u00a0205 g
2 cm|1/2 cm
1/2 cm|1 1/2 cm
½ cm|1½ cm
½ cm|1 ½ cm
4 cm|3-4 cm
3|3-4 cm
4 cm|3 - 4 cm
3 cm|2\u20133 cm
5 cm|>5 cm
5 cm|tumor > 5 cm
5 cm|≥5 cm
5 cm|>=5 cm
5 cm|~ 5 cm
5|-5
5|\u22125
2.5|2.5 ± 0.5 cm
0.5|2.5+/-0.5
9|10^9
10|10^9
10|10⁹
9|10^-9
5|5 x 10^9/L
5|1e-5
2|2:1
5|5%
2|IHC 2+
4|Gleason 3+4=7
T2|T2-3
C50|C50.9
５|２．５
5 cm|2x.5 cm
2024|12/2024
三|二十三
3|3万
left|Cleft
cm|2.5cm
e|e\u0301
リンパ|リンパミ
east|breast
ER|ERα
"""
WHOLE = """
2.5 cm|Size: 2.5 cm.
2.5 cm|size -> 2.5 cm
2.5 cm|Size> 2.5 cm
2.5 cm|Size - 2.5 cm
2.5 cm|Grade 2\\n- 2.5 cm
5.2cm|shrank 6.4cm > 5.2cm
1.6 x 1.4 cm|is 1.6 x 1.4 cm, second
.5 cm|of .5 cm
>5 cm|>5 cm
> 5 cm|> 5 cm
3-4 cm|3-4 cm
10^9|10^9
2,5 cm|links, 2,5 cm
pT2, pN1a|pT2, pN1a
1'205 g|1'205 g
5 cm|left breast.5 cm
ER|ER+/PR-
ER+|ER+/PR-
PR-|ER+/PR-
HER2|HER2+
HER2-|HER2-
20%|Ki-67 20%
20 %|Ki67:20 %
T2|T2-N0
N0|T2-N0
left|Site:left
Barrett|Barrett's
5 cm|grade 2\\n5 cm
5|a 5.
2.5 cm|2.5 cm-mass
Ø|Ø 2 cm
左乳|左乳浸润性导管癌，2.5cm。
浸润性导管癌|左乳浸润性导管癌，2.5cm。
2.5cm|肿瘤大小2.5cm，切缘阴性
2.5 cm|肿瘤大小2.5 cm，切缘阴性
右肺上葉|原発は右肺上葉の腺癌
腺癌|原発は右肺上葉の腺癌
リンパ|リンパ節
乳房|乳房CT
มะเร็งปอด|ผู้ป่วยเป็นมะเร็งปอดระยะที่สาม
유방암|좌측 유방암입니다
"""


def cases(lines):
    return [line.replace("\\n", "\n").split("|") for line in lines.strip().splitlines()]


@pytest.mark.parametrize(("value", "note"), cases(PARTS))
def test_part_of_a_word_or_number_has_no_place(value, note):
    assert value in note and not occurs_in(value, note)


@pytest.mark.parametrize(("value", "note"), cases(WHOLE))
def test_whole_words_and_numbers_have_a_place(value, note):
    assert note.index(value) in [start for start, _ in occurrences(value, note)]


def test_a_place_is_that_of_the_note_whatever_its_white_space_and_case():
    note = "A 2.5\ncm tumor; Grade 2. Breasts and breast, breast"
    assert occurrences("2.5 cm", note) == [(2, 8)]
    assert occurrences("grade 2", note) == [] and occurrences("grade 2", note, ignore_case=True) == [(16, 23)]
    assert [note[start:end] for start, end in occurrences("breast", note)] == ["breast", "breast"]
    assert occurrences("5 5", "5 5 5") == [(0, 3), (2, 5)]
    assert occurrences("", note) == []


digits = st.text("0123456789", min_size=1, max_size=3)
signs = st.sampled_from([*".,·'’/-–^:±×\u066b\u066c", "**", "^-", "+/-"])
before = st.sampled_from(["", *"-+−±><≥~.·", "<=", "> ", "≈ "])
after = st.sampled_from(["", *"%+′‰"])
left, right = st.sampled_from(["", "tumor ", "(", "Size: ", "癌"]), st.sampled_from(["", " cm", ").", ", 3 cm", " \n"])


@settings(max_examples=300)
@given(digits, st.lists(st.tuples(signs, digits), max_size=3), before, after, left, right)
def test_no_number_is_ever_cut(first, rest, before, after, left, right):
    number = before + first + "".join(sign + more for sign, more in rest) + after
    inside = range(len(left) + 1, len(left) + len(number))
    assert not set(edges(left + number + right)) & set(inside)


scripts = st.text("abß é\u0301éЖ癌左ひカタกา유방\u200d\u00ad ,;:.()-'’12\n", max_size=30)


@settings(max_examples=300)
@given(scripts)
def test_word_edges_are_unicodes(text):
    """UAX #29 by another implementation, outside numbers: each of its word edges is ours, and the others of ours are
    beside what the module's docstring names."""
    ours = set(edges(text))
    theirs = {m.start() for m in regex.finditer(r"(?w)\b", text)} | {0, len(text)}
    between = {n for n in range(1, len(text)) if text[n - 1] not in "12.,-:'’ \n\u00ad\u200d" and text[n] not in "12"}
    assert theirs & between <= ours
    for n in ours - theirs - {0, len(text)}:
        beside = text[n - 1 : n + 1]
        assert set(beside) & set(".:'’,;1유방 \n()-\u200d\u00ad\u0301") or not any(c.isalnum() for c in beside), beside
