"""The pages that people read lead nowhere that is not there, and their commands name what there is."""

import json
import operator
import re
from pathlib import Path

import pytest

import edge_phi3
from scripts import update_docs
from tests.support.cases import cases
from tests.support.documents import LANGUAGES, NEEDS, PAGES, PROGRAMS, ROOT, blocks, mistakes, page_mistakes, unfenced

_WHERE = ("*.md", "docs/*.md", "benchmarks/**/*.md", "helm/edge-phi3/README.md", "tests/golden/README.md")
LINKED = [page for pattern in _WHERE for page in ROOT.glob(pattern)]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_QUOTED = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)

name_of = operator.attrgetter("name")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    lines = unfenced(page.read_text(encoding="utf-8")).splitlines()
    headings = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(unfenced(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_links_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in _LINK.findall(text) if "://" not in link}
    assert {*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")} - {ROOT / "README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A block has a language, so that it is run or checked; no command hides in an indented one."""
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(text)), "a fence that is not closed, or has an unknown form"
    assert {block.language for block in blocks(text)} <= LANGUAGES
    hidden = re.compile(rf"^ {{4,}}(?:\$ )?(?:{'|'.join(sorted(PROGRAMS))}) ")
    assert [line for line in unfenced(text).splitlines() if hidden.match(line)] == []
    for block in blocks(text, "json"):
        json.loads(block.text)
    for block in blocks(text):
        first = block.text.partition("\n")[0]
        assert not first.startswith("# Needs") or NEEDS.match(first), f"{first} is not a reason that the tests know"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_names_what_there_is(page: Path) -> None:
    assert page_mistakes(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", sorted({*LINKED} - {*PAGES}), ids=name_of)
def test_every_target_and_module_named_for_developers_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [f"make {target}" for target in re.findall(r"(?:`|^ +)make ([\w-]+)", text, re.MULTILINE)]
    modules = re.findall(r"python -m ((?:benchmarks|tests)\.(?!NAME)[\w.]*\w)", text)
    named += [f"python -m {module}" for module in modules]
    assert [mistake for command in named for mistake in mistakes(command)] == []


@cases
def test_a_mistake_in_a_command_is_found(command: str, mistake: str) -> None:
    (found,) = mistakes(command)
    assert mistake in found


def test_the_public_names_are_there_and_documented() -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    for name in edge_phi3.__all__:
        assert getattr(edge_phi3, name) is not None
        assert f"`{name}`" in page
    assert set(dir(edge_phi3)) == set(edge_phi3.__all__)
    private = "TokenOffsets"
    with pytest.raises(AttributeError, match=f"no attribute '{private}'"):
        getattr(edge_phi3, private)


def test_the_troubleshooting_page_quotes_sentences_of_the_code() -> None:
    """Each symptom is text that the code prints; three dots stand for what differs."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("edge_phi3/**/*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    quoted = _QUOTED.findall((ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) >= 20
    pieces = [piece.strip() for quote in quoted for piece in quote.split("...")]
    assert [piece for piece in pieces if piece not in joined] == []


@pytest.mark.parametrize("name", update_docs.PAGES)
def test_what_is_made_from_the_code_is_up_to_date(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert page == update_docs.updated(name), "run python scripts/update_docs.py"
