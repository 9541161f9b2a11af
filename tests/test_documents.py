"""What comments, docstrings and pages cite exists: documents, and rules of docs/algorithm.md by number."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dspark_jax", "train", "infer", "configs", "tests", "docs")
FILES = sorted(
    file
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".md") and file.is_file()
)
NUMBERS = [int(n) for n in re.findall(r"^(\d+)\. ", (ROOT / "docs/algorithm.md").read_text("utf-8"), re.MULTILINE)]
RULES = set(NUMBERS)
CITED_RULES = re.compile(r"\b[Rr]ules?\s+(\d+(?:(?:,\s+|,?\s+and\s+|\s+to\s+|-)\d+)*)")
CITED_DOCUMENT = re.compile(r"[\w./-]*\w\.md\b")
# Documents that the project was begun from and does not contain.
ABSENT = re.compile(r"golden/NOTES|\bNOTES \d|\bSPEC sections? \d|\bFIELD (?:sections? )?\d")
WRITTEN = {"README.md", "docs/x.md"}  # by programs, or as an example below


def cited_rules(text: str) -> set[int]:
    """Every number that "rule 24", "rules 21-23" or "rules 3 to 6 and 9" names, ranges filled in."""
    numbers: set[int] = set()
    for cited in CITED_RULES.findall(re.sub(r"\n\s*#?\s*", " ", text)):
        for first, last in re.findall(r"(\d+)(?:(?:-|\s+to\s+)(\d+))?", cited):
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def test_the_rules_are_numbered_without_gaps() -> None:
    expected = list(range(1, len(NUMBERS) + 1))
    assert expected == NUMBERS


def test_citations_are_found_in_every_form() -> None:
    text = "(rule 24), rules 21-23; docs/algorithm.md, rules 3 to 6 and 9, Rules 46,\n    # 53"
    assert cited_rules(text) == {24, 21, 22, 23, 3, 4, 5, 6, 9, 46, 53}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_cited_exists(folder: str) -> None:
    wrong = []
    for file in FILES:
        if file.relative_to(ROOT).parts[0] != folder or file == Path(__file__):
            continue
        text = file.read_text(encoding="utf-8")
        wrong += [f"{file}: rule {number}" for number in cited_rules(text) - RULES]
        wrong += [f"{file}: {name}" for name in ABSENT.findall(text)]
        for name in set(CITED_DOCUMENT.findall(text)) - WRITTEN:
            if not any((place / name).exists() for place in (ROOT, ROOT / "docs", file.parent)):
                wrong.append(f"{file}: {name}")
    assert not wrong


def test_the_tests_that_a_page_names_exist() -> None:
    """docs/reliability.md names a test for each of its 32 kinds of faults."""
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    kinds, wrong = set[int](), []
    for number, tests in re.findall(r"^\| (\d+) \| [^|]+ \| (.+) \|$", page, re.MULTILINE):
        kinds.add(int(number))
        source = ""
        for file, name in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", tests):
            source = (ROOT / "tests" / file).read_text(encoding="utf-8") if file else source
            wrong += [name] if name and f"def {name}(" not in source else []
    assert kinds == set(range(1, 33)) and not wrong
