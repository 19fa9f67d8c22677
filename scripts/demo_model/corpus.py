"""The corpus: what the running interpreter's standard library says about itself, as questions and answers."""

import importlib
import inspect
import json
import random
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_LISTS = Path(__file__).parent

SKIPPED_MODULES = frozenset((_LISTS / "skipped_modules.txt").read_text("utf-8").split())
"""Importing these opens windows or prints, or they repeat what another module says under its documented name."""

SUBMODULES = frozenset((_LISTS / "submodules.txt").read_text("utf-8").split())
"""Submodules that the library's documentation treats as modules of their own."""

EMPHASISED = frozenset((_LISTS / "well_known_names.txt").read_text("utf-8").split())
"""Names that newcomers are likely to ask about. Training shows them more often than the rest; the card says so."""

QUESTIONS = tuple((_LISTS / "questions.txt").read_text("utf-8").splitlines())
"""The card's ten questions, fixed before the first training run."""

LONGEST_ANSWER = 240
"""The most characters of an answer."""

_PHRASINGS = (
    ("What does {} do?", 34),
    ("What does `{}` do?", 30),
    ("what does {} do", 6),
    ("What does {}() do?", 6),
    ("What is {}?", 8),
    ("What is `{}`?", 6),
    ("Explain {}.", 5),
    ("Explain `{}`.", 5),
)
_SIGNATURE_LINE = re.compile(r"^[\w.]+\s*\(.*\)\s*(?:(?:-{1,2}>|=>)\s*(.*)|--?|:)?$")
_SIGNATURE_PREFIX = re.compile(r"^[\w.]+\([^()]*\)\s*(?:-{1,2}>|--|—|:)\s*")
_PROSE = re.compile(r"^(?:[A-Z`'\"]|an? )(?=.* )(?=.*[a-z]).{11}")
_MARKUP = re.compile(r">>>|->|::|:param|\s[-*|]\s")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")


def dice(seed: int | str) -> random.Random:
    """Return the random numbers of a seed."""
    return random.Random(seed)  # noqa: S311 - shuffles data, guards nothing


@dataclass(frozen=True, slots=True)
class Item:
    """One public name of the library and what its docstring says first."""

    name: str
    answer: str
    module: bool = False

    @property
    def emphasised(self) -> bool:
        """Whether training shows this item more often."""
        return self.name in EMPHASISED

    def ask(self, chance: random.Random) -> str:
        """Return one of the phrasings of the question about this item."""
        forms, weights = zip(*_PHRASINGS, strict=True)
        form = chance.choices(forms, weights)[0]
        return str(form).replace("()", "").format(self.name) if self.module else str(form).format(self.name)


@dataclass(frozen=True, slots=True)
class Split:
    """Items that are trained on, and items that never are."""

    trained: list[Item]
    held_out: list[Item]


def first_paragraph(docstring: str) -> str | None:
    """Return a docstring's first paragraph as one line, cut to the whole sentences within `LONGEST_ANSWER` characters.

    A signature that C functions carry in front of their text is left out, unless what follows its arrow is all the
    text there is. None when nothing fits.
    """
    result = None
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and (signature := _SIGNATURE_LINE.match(lines[0])):
            result = result or " ".join((signature[1] or "").split())
            lines.pop(0)
        if text := _SIGNATURE_PREFIX.sub("", " ".join(" ".join(lines).split())):
            return _first_sentences(text)
    return _first_sentences(result) if result else None


def _first_sentences(text: str) -> str | None:
    """Return the leading sentences that fit, none that announces a list or an example; None where it is no prose."""
    kept = ""
    for sentence in _SENTENCE_END.split(text):
        longer = f"{kept} {sentence}".strip()
        if len(longer) > LONGEST_ANSWER or sentence.endswith(":"):
            break
        kept = longer
    return kept if _PROSE.match(kept) and not _MARKUP.search(kept) else None


def _modules() -> Iterator[tuple[str, types.ModuleType]]:
    names = {name for name in sys.stdlib_module_names if not name.startswith("_")} - SKIPPED_MODULES
    for name in ["builtins", *sorted((names - {"builtins"}) | SUBMODULES)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield name, importlib.import_module(name)
            except ImportError:
                continue  # of another operating system, or a part this interpreter was built without


def _members(prefix: str, module: types.ModuleType) -> Iterator[tuple[str, object]]:
    listed = getattr(module, "__all__", None)
    for name in sorted(set(listed or dir(module))):
        thing = getattr(module, name, None)
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        home = getattr(thing, "__module__", None) or ""
        if listed is None and home.lstrip("_") != module.__name__:
            continue
        yield prefix + name, thing
        if inspect.isclass(thing):
            for method, value in sorted(vars(thing).items()):
                if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                    yield f"{prefix}{name}.{method}", value


def read_corpus() -> list[Item]:
    """Read every public module, class, function and method of the running interpreter's standard library.

    A fresh process of the same interpreter reads it, isolated from installed packages: transformers, for one, adds
    methods to `logging.Logger`, and torch replaces `inspect.getfile`. Return items in a fixed order, no name twice.
    Where several names share a text, the emphasised ones keep it, or else the shortest one.
    """
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(Path(__file__).resolve())]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return [Item(**fields) for fields in json.loads(output)]


def _read() -> list[Item]:
    found: list[Item] = []
    for name, module in _modules():
        members = _members("" if name == "builtins" else f"{name}.", module)
        for path, thing in [(name, module), *members]:
            doc = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
            if isinstance(doc, str) and (answer := first_paragraph(doc)) is not None:
                found.append(Item(path, answer, module=thing is module))
    found.sort(key=lambda item: (not item.emphasised, len(item.name), item.name))
    kept: list[Item] = []
    names: set[str] = set()
    answers: set[str] = set()
    for item in found:
        if item.name not in names and (item.emphasised or item.answer not in answers):
            names.add(item.name)
            answers.add(item.answer)
            kept.append(item)
    return kept


def split_corpus(items: Sequence[Item], seed: int, share: float) -> Split:
    """Hold back a random `share` (0 to 1) of the items, drawn from those that are not emphasised."""
    ordinary = [item for item in items if not item.emphasised]
    chosen = dice(seed).sample(ordinary, round(share * len(items)))
    names = {item.name for item in chosen}
    return Split([item for item in items if item.name not in names], chosen)


def question_name(question: str) -> str:
    """Return the name that one of `QUESTIONS` asks about."""
    return question.removeprefix("What does ").removesuffix(" do?").strip("`")


def expected_answer(question: str, items: Sequence[Item]) -> str:
    """Return the answer that training teaches for one of `QUESTIONS`."""
    return next(item.answer for item in items if item.name == question_name(question))


if __name__ == "__main__":
    print(json.dumps([asdict(item) for item in _read()]))
