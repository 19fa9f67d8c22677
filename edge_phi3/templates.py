"""Chat templates in Jinja, as transformers sets it up; also a process of its own for the templates of strangers.

A template comes with a model file, from anywhere. It runs in the sandbox that transformers uses (CVE-2024-34359), which
bounds neither its time nor its memory: ``python -m edge_phi3.templates`` does, and can be ended.
"""

import datetime as dt
import functools
import json
import resource
from typing import Any, Final, NoReturn, Self

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

from edge_phi3.llama.child_process import Emit, bound, serve_jobs

MOST_CHARACTERS: Final = 8 << 20
MOST_MEMORY: Final = 512 << 20
MOST_SECONDS: Final = 1
"""Of the text that a template makes, and the bytes and the processor time that a stranger's may take for it."""

_LONGEST_PROBLEM = 300


class Job(msgspec.Struct):
    """A template, and the values that it finds by name, as JSON; empty where it is only compiled."""

    source: str
    names: str


class Rendered(msgspec.Struct, tag=True):
    """What came of it: a text, and why there is none, as a list in JSON; UTF-8 may not hold them."""

    outcome: str

    @classmethod
    def of(cls, text: str = "", problem: str = "") -> Self:
        """Return either as the other process sends it."""
        return cls(json.dumps([text, problem]))


def _render(template: jinja2.Template, names: dict[str, Any]) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(names):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"it makes a text of more than {MOST_CHARACTERS} characters")
    return "".join(pieces)


def attempt(job: Job) -> Rendered:
    """Do a job; what a template can do wrong has no end."""
    try:
        compiled = _compiled(job.source)
        return Rendered.of(_render(compiled, json.loads(job.names)) if job.names else "")
    except Exception as error:  # noqa: BLE001 - see above
        refuses = isinstance(error, jinja2.TemplateError)
        cause = (str(error) if refuses else f"{type(error).__name__}: {error}")[:_LONGEST_PROBLEM]
        problem = f"the model's chat template refuses them: {cause}"
        if not job.names:
            problem = f"the model's chat template cannot be compiled ({cause}); send `prompt` instead."
        elif not refuses:
            problem = f"the model's chat template fails on them ({cause})."
        return Rendered.of(problem=problem)


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, with which templates mark what an assistant said, for training."""

    tags = {"generation"}  # noqa: RUF012 - so Jinja wants it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the block's content, which has a scope of its own."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own writes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_ENVIRONMENT.filters["tojson"] = _to_json
_ENVIRONMENT.globals["raise_exception"] = _refuse
_ENVIRONMENT.globals["strftime_now"] = lambda pattern: dt.datetime.now().astimezone().strftime(pattern)


def _work(job: Job, emit: Emit) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    # In whole seconds, of which the present one has begun. Past them the process ends.
    most = int(used.ru_utime + used.ru_stime) + 1 + MOST_SECONDS
    bound(RLIMIT_CPU=most)
    emit(attempt(job))


if __name__ == "__main__":
    serve_jobs(Job, _work, ready=lambda _: bound(RLIMIT_AS=MOST_MEMORY, RLIMIT_CORE=0))
