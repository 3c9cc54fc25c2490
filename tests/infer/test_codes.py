"""The ICD-10-CM table and lookup of codes by text."""

import pytest

from infer import codes


def test_table_agrees_with_the_public_package():
    icd = pytest.importorskip("simple_icd_10_cm", reason="needs simple-icd-10-cm (the peers extra)")
    known = [c for c in icd.get_all_codes(True) if icd.is_category_or_subcategory(c) and "C00" <= c[:3] <= "D49"]
    assert list(codes.CODES) == list(dict.fromkeys(known))
    assert all(codes.CODES[code] == icd.get_description(code) for code in known)
    assert all(codes.is_billable(code) == icd.is_leaf(code) for code in known)


def test_categories_are_not_billable():
    assert [codes.is_billable(code) for code in ("C50", "C50.4", "C50.41", "C50.411", "C61")] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert not codes.is_billable("Z99.9")
    assert set(codes.BILLABLE) < set(codes.CODES)


def test_a_code_is_found_dotted_or_not():
    assert codes.describe("c50411") == codes.describe("C50.411")
    assert codes.lookup("c50411") == codes.lookup(" C50.411 ") == ["C50.411"]
    assert codes.lookup("breast cancer (C50.411)") == ["C50.411"]
    with pytest.raises(KeyError, match="C99.9"):
        codes.describe("C99.9")


def test_every_billable_description_leads_back_to_its_code():
    wrong = [c for c in codes.BILLABLE if codes.CODES[codes.lookup(codes.CODES[c].upper() + ".")[0]] != codes.CODES[c]]
    assert not wrong


def test_near_descriptions_find_the_nearest_code():
    assert codes.lookup("malignant neoplasm upper outer quadrant, left breast, female")[0] == "C50.412"
    assert codes.lookup("malignant neoplasm of sigmoid")[0] == "C18.7"
    assert len(codes.lookup("malignant neoplasm", limit=3)) == 3


def test_nothing_known_finds_nothing():
    assert codes.lookup("") == codes.lookup("zzzz qqqq") == []
