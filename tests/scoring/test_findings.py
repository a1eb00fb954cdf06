"""Statements of reports: negation, sides, spelling, and lists of words of one's own."""

from pathlib import Path

import pytest

from umbrella_jax.errors import ConfigError
from umbrella_jax.scoring.findings import MentionKind, default_word_list, read_word_list


def stated(text: str, kind: MentionKind = "finding") -> set[str]:
    """Return the statements of a text, each as its words; an absent one begins with `no`."""
    statements = default_word_list().statements(text, kind)
    return {" ".join((["no"] if s[-1] == "absent" else []) + list(s[:-1])) for s in statements}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No evidence of acute infarct, haemorrhage or mass.", {"no infarct", "no haemorrhage", "no tumour"}),
        ("No infarct. Atrophy.", {"no infarct", "atrophy"}),
        ("No infarct\nAtrophy of the cerebellum", {"no infarct", "atrophy"}),
        ("No infarct; atrophy.", {"no infarct", "atrophy"}),
        ("No infarct but atrophy.", {"no infarct", "atrophy"}),
        ("No abnormality except for a cyst.", {"no abnormality", "cyst"}),
        ("No new infarct and the known mass is unchanged.", {"no infarct", "tumour"}),
        ("No comparison: infarct.", {"infarct"}),
        ("No infarct, there is atrophy.", {"no infarct", "atrophy"}),
        ("Atrophy without hydrocephalus.", {"atrophy", "no hydrocephalus"}),
        ("A mass (without oedema) and an infarct.", {"tumour", "no oedema", "infarct"}),
        ("The patient denies stroke.", {"no infarct"}),
        ("Absence of midline shift.", {"no midline shift"}),
        ("Negative for oedema.", {"no oedema"}),
        ("Infarct and haemorrhage were ruled out.", {"no infarct", "no haemorrhage"}),
        ("MRI ruled out infarct.", {"no infarct"}),
        ("Atrophy is present, an infarct is not seen.", {"atrophy", "no infarct"}),
        ("Not only atrophy but also an infarct.", {"atrophy", "infarct"}),
        ("No change of the known infarct.", {"infarct"}),
        ("An infarct cannot be ruled out.", {"infarct"}),
        ("A non-haemorrhagic infarct.", {"no haemorrhage", "infarct"}),
        ("Infarct rather than tumour.", {"infarct", "no tumour"}),
        ("The ventricles are normal.", {"no abnormality"}),
        ("The ventricles are not normal.", {"abnormality"}),
        ("White-matter hyperintensities; metastases.", {"white matter hyperintensity", "tumour"}),
        ("HEMORRHAGE, edema, tumors", {"haemorrhage", "oedema", "tumour"}),
        ("Massive lesional cysticercosis", set()),  # no term is matched inside a word
        ("A 3.5 cm mass without a bleed.", {"tumour", "no haemorrhage"}),
        (
            "Infarct: none. Oedema: no, mass: yes (bleed: absent).",
            {"no infarct", "no oedema", "tumour", "no haemorrhage"},
        ),
        ("Infarct - negative", {"no infarct"}),
        ("No evidence of any of: infarct, oedema.", {"no infarct", "no oedema"}),
        ("MRI without and with contrast. An MRI without contrast shows a cyst.", {"cyst"}),
        ("The MRI does not show an infarct.", {"no infarct"}),
        ("An infarct that was not seen on the prior study.", {"infarct"}),
        ("The infarct is no longer seen compared to the prior study.", {"no infarct"}),
        ("No oedema around the known mass.", {"no oedema", "tumour"}),
        ("No infarct of the thalamus or bleed of the pons.", {"no infarct", "no haemorrhage"}),
        ("Not without atrophy; no doubt an infarct.", {"atrophy", "infarct"}),
        ("Œdema, hæmorrhage, in\N{SOFT HYPHEN}farct, ﬁstula", {"oedema", "haemorrhage", "infarct"}),
    ],
)
def test_negation_and_spelling(text: str, expected: set[str]) -> None:
    assert stated(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Infarct in the left thalamus.", {"thalamus left"}),
        ("No infarct in the left thalamus.", {"no thalamus left"}),
        ("Bilateral hippocampal atrophy.", {"hippocampus left", "hippocampus right"}),
        ("Both hippocampi are atrophic.", {"hippocampus left", "hippocampus right"}),
        ("Left frontal and right parietal lesions.", {"frontal lobe left", "parietal lobe right"}),
        (
            "Left frontal, parietal and temporal infarct.",
            {f"{x} lobe left" for x in ("frontal", "parietal", "temporal")},
        ),
        ("Lesions of frontal and parietal lobes on the right.", {"frontal lobe right", "parietal lobe right"}),
        ("A lesion of the left frontal lobe and the thalamus.", {"frontal lobe left"}),
        ("A left infarct of the thalamus.", {"thalamus left"}),
        ("Midline shift to the left.", {"midline shift left"}),
        ("No lesion on the left, with infarcts on the right.", {"no lesion left", "infarct right"}),
        ("Left thalamic infarct; no mass in the right cerebellum.", {"thalamus left", "no cerebellum right"}),
        ("Patient turned left.", set()),
    ],
)
def test_a_side_belongs_to_the_nearest_region_or_finding(text: str, expected: set[str]) -> None:
    assert stated(text, "side") == expected


def test_accents_may_be_characters_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("findings: {infarct: [ischémie]}", encoding="utf-8")
    words = read_word_list(tmp_path / "words.yaml")
    assert len(words.mentions("Isch\N{COMBINING ACUTE ACCENT}mie, ischémie, ische\N{COMBINING ACUTE ACCENT}mie")) == 2


def test_a_region_is_absent_if_its_finding_is() -> None:
    text = "Atrophy of the hippocampus without infarct of the thalamus. The ventricles are enlarged. Pons: normal."
    assert stated(text, "region") == {"hippocampus", "no thalamus", "ventricles", "no brain stem"}
    mentions = default_word_list().mentions("Tumour of the pons.")
    assert [(m.name, m.about, m.start, m.end) for m in mentions] == [
        ("tumour", None, 0, 6),
        ("brain stem", "tumour", 14, 18),
    ]


def test_a_list_replaces_the_default_or_extends_it(tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    own = "findings: {tuber: [tuber, cortical tuber]}\n"
    file.write_text(own)
    assert read_word_list(file).names("finding") == ("tuber",)
    file.write_text(f"{own}extend: true\n")
    words = read_word_list(file)
    assert words.names("finding") == (*default_word_list().names("finding"), "tuber")
    assert words.statements("No cortical tubers, an infarct.", "finding") == {
        ("tuber", "absent"),
        ("infarct", "absent"),
    }


def test_refuses_a_faulty_list_by_entry(tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("finding: {}\nfindings: {a: [], b: ['...']}\nsides: {top: [upper]}\nextend: 1\n")
    with pytest.raises(ConfigError) as error:
        read_word_list(file)
    assert [fault.removeprefix(f"{file}: ").partition(": expected")[0] for fault in error.value.faults] == [
        "finding: no such section; expected one of findings, absent, regions, sides, extend",
        "extend",
        "findings: a",
        "findings: b",
        "sides: top",
    ]
