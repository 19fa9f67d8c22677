"""Random requests of all kinds, many at a time, through the real service on small real models: none may do it harm.

    python -m tests.support.service_fuzz --requests 2000 --seed 1
    python -m tests.support.service_fuzz --requests 2000 --seed 1 --only 5      # one of its services again

Each service is ``edge-phi3 serve`` on a random model of one of four kinds (4k, 128k, a window of 64, grouped attention)
with its own options. Clients send requests of every kind and size, good and bad; some leave, among them beam searches
beside greedy ones. Then it holds:

- each request was answered, or refused at once with a sentence, none after its deadline;
- the service is well and at rest, its log has no error, and SIGTERM ends it while requests run;
- requests that can be repeated, sent alone to the same service, and to a fresh one without a prefix cache, get equal
  tokens, and scores to 1e-3. Where llama.cpp's rounding decides between two tokens, an answer counts as "by rounding"
  when the fresh service gives it after noise of 1e-5 or 1e-4 was put into its scores.

What failed is printed as JSON: the service's options, and the request's path and body. Exit code 1 then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
from rich.console import Console
from rich.table import Table

from tests.support.service_client import CHAT, Ask, Outcome, column_of, complaint_about, difference, send
from tests.support.service_requests import VOCABULARY, WORDS, AskMaker, Chain
from tests.support.service_setups import KINDS, USUAL_KINDS, Setup, make_model, make_setups
from tests.support.services import Server, known_options, serving, wait_for

COLUMNS = ("answered", "refused", "queue full", "left", "nothing to choose", "failed")
_SLACK = 30.0
"""Seconds after its deadline in which the answer to a request reaches a client of a busy machine."""

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
_TOLERANCE = 1e-3
_NOISES = (1e-5,) * 10 + (1e-4,) * 10
_MOST_DOUBTS = 5
"""Differences of one service that are looked into; where there are more, it is not rounding."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that is not as it should be, and how to see it again."""

    what: str
    setup: Setup
    options: list[str]
    ask: Ask | None = None

    def to_json(self) -> str:
        """Give it as one line."""
        told: dict[str, Any] = {"what": self.what, "model": self.setup.kind, "options": self.options}
        if self.ask is not None:
            body = self.ask.body if isinstance(self.ask.body, dict) else repr(self.ask.body[:200])
            told |= {"kind": self.ask.kind, "leaves": self.ask.leaves, "path": self.ask.path, "body": body}
        return json.dumps(told)


@dataclass
class Report:
    """What came of all requests."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def __iadd__(self, other: Report) -> Self:
        self.counts += other.counts
        self.failures += other.failures
        return self

    def table(self) -> Table:
        """Give the counts by kind and outcome."""
        columns = (*COLUMNS, "not sent", "compared", "equal", "by rounding", "different")
        table = Table("kind", *columns, box=None)
        for kind in sorted({kind for kind, _ in self.counts}):
            table.add_row(kind, *(str(self.counts[kind, column] or "") for column in columns))
        totals = [sum(count for (_, name), count in self.counts.items() if name == column) for column in columns]
        table.add_row("all", *map(str, totals), style="bold")
        return table


class Trial:
    """One service, tried.

    Args:
        setup: its kind and options.
        model: the GGUF.
        folder: where logs go.
        known: the options that ``serve`` has.
        seed: of all that is random.
        threads: clients at a time.
        refusal: seconds in which a refusal must come, whatever the load.
        options: further ones of ``serve``.
    """

    def __init__(
        self,
        setup: Setup,
        model: Path,
        folder: Path,
        *,
        known: frozenset[str],
        seed: int,
        threads: int = 12,
        refusal: float = 10.0,
        options: Sequence[str] = (),
    ) -> None:
        self.report = Report()
        self._setup = setup
        self._model = model
        self._folder = folder
        self._random = random.Random(seed)
        self._threads = threads
        self._refusal = refusal
        self._deadline = setup.request_timeout + _SLACK
        self._options = [*setup.arguments(known), *options]
        self._fresh_options = [*setup.arguments(known, prefix_cache=False), *options]
        self._lost = threading.Event()
        self._lock = threading.Lock()

    def run(self, blocks: Sequence[list[Chain]], share: float) -> Report:
        """Send all requests, look at the service, and repeat a share of those that can be repeated."""
        with self._serving(self._options) as server:
            done = self._send_all(server, deque(chain for block in blocks for chain in block))
            asked = [pair for pair in done if pair[0].repeats and self._is_repeated(pair, share)]
            repeated: list[Outcome] = []
            if not self._lost.is_set() and not self._note_all(server.troubles(self._deadline)):
                repeated = [self._send_alone(server, ask) for ask, _ in asked]
                self._note_all(server.troubles(self._deadline))
            errors = server.logged_errors()
            self._note_all(errors)
            self._stop_while_busy(server)
            # What is aborted at the end is told as an error by llama.cpp.
            self._note_all([line for line in server.logged_errors()[len(errors) :] if "Traceback" in line])
        if repeated and self._setup.is_exact:
            with self._serving(self._fresh_options) as fresh:
                self._compare(fresh, asked, repeated)
        return self.report

    def _serving(self, options: list[str]) -> Any:
        return serving(self._folder, str(self._model), *options, store=self._folder)

    def _note_all(self, whats: list[str]) -> int:
        for what in whats:
            self._note(what)
        return len(whats)

    def _note(self, what: str, ask: Ask | None = None) -> None:
        self.report.failures.append(Failure(what, self._setup, self._options, ask))

    # -- many at a time

    def _send_all(self, server: Server, chains: deque[Chain]) -> list[tuple[Ask, Outcome]]:
        done: list[tuple[Ask, Outcome]] = []

        def work() -> None:
            while not self._lost.is_set():
                with self._lock:
                    if not chains:
                        return
                    chain = chains.popleft()
                for pair in self._send_chain(server, chain):
                    with self._lock:
                        done.append(pair)

        workers = [threading.Thread(target=work) for _ in range(self._threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.report.counts.update((ask.kind, "not sent") for chain in chains for ask in chain)
        return done

    def _send_chain(self, server: Server, chain: Chain) -> Iterator[tuple[Ask, Outcome]]:
        before: tuple[Ask, Outcome] | None = None
        for planned in chain:
            ask = planned
            if planned.follows and before is not None and before[1].answer is not None:
                ask = planned.after(before[0], before[1].answer.text)
            outcome = send(server.port, ask, self._deadline)
            complaint = complaint_about(ask, outcome, deadline=self._deadline, refusal=self._refusal)
            with self._lock:
                self.report.counts[ask.kind, column_of(ask, outcome)] += 1
                if complaint:
                    self._note(complaint, ask)
            if complaint and (outcome.status == 0 or not _is_alive(server)):
                self._lost.set()
            yield ask, outcome
            before = ask, outcome

    def _is_repeated(self, pair: tuple[Ask, Outcome], share: float) -> bool:
        ask, outcome = pair
        if outcome.status in {0, 429} or outcome.status >= 500:
            return False
        return ask.always or self._random.random() < share

    # -- alone

    def _send_alone(self, server: Server, ask: Ask) -> Outcome:
        wait_for(server.is_idle, self._deadline)
        return send(server.port, ask, self._deadline)

    def _compare(self, fresh: Server, asked: list[tuple[Ask, Outcome]], repeated: list[Outcome]) -> None:
        doubts = 0
        for (ask, under_load), afterwards in zip(asked, repeated, strict=True):
            alone = self._send_alone(fresh, ask)
            verdict = "equal"
            for name, outcome in (("under load", under_load), ("alone afterwards", afterwards)):
                found = difference(outcome, alone, _TOLERANCE)
                if not found:
                    continue
                doubts += 1
                if doubts <= _MOST_DOUBTS and self._is_rounding(fresh, ask, outcome):
                    verdict = "by rounding" if verdict == "equal" else verdict
                    continue
                verdict = "different"
                self._note(f"{name} it is not what a fresh service answers: {found}", ask)
            if self._setup.exact_seeds and ask.has_seed and (found := difference(under_load, afterwards, 0.0)):
                verdict = "different"
                self._note(f"its seed does not repeat it to the last bit: {found}", ask)
            self.report.counts[ask.kind, "compared"] += 1
            self.report.counts[ask.kind, verdict] += 1

    def _is_rounding(self, fresh: Server, ask: Ask, outcome: Outcome) -> bool:
        if outcome.answer is None:
            return False
        noisy = (self._send_alone(fresh, self._with_noise(ask, noise)) for noise in _NOISES)
        return any(not difference(outcome, other, 10 * _TOLERANCE) for other in noisy)

    def _with_noise(self, ask: Ask, noise: float) -> Ask:
        assert isinstance(ask.body, dict)
        given = ask.kwargs.get("sequence_bias") or []
        taken = {tuple(phrase) for phrase, _ in given}
        tokens = [token for token in range(1, len(VOCABULARY)) if (token,) not in taken]
        biases = given + [[[token], self._random.gauss(0.0, noise)] for token in tokens]
        return dataclasses.replace(ask, body=ask.body | {"generate_kwargs": ask.kwargs | {"sequence_bias": biases}})

    # -- the end

    def _stop_while_busy(self, server: Server) -> None:
        """Send SIGTERM while requests run; the process ends with 0 within its grace period and a while."""
        most = max(8, min(400, self._setup.cells // 8))
        endless = {"do_sample": False, "max_new_tokens": most, "eos_token_id": [], "max_time": 20}
        asks = [
            Ask(
                "at the end",
                CHAT,
                {"prompt": word, "stream": beams == 1, "generate_kwargs": endless | {"num_beams": beams}},
            )
            for word, beams in zip(WORDS, (1, 1, 4, 1, 4, 1), strict=False)
        ]
        clients = [threading.Thread(target=send, args=(server.port, ask, self._deadline)) for ask in asks]
        if not self._lost.is_set():
            for client in clients:
                client.start()
            wait_for(lambda: bool(server.metrics()["num_requests_running"]) or not any(map(_runs, clients)))
        try:
            code, _ = server.stop(patience=self._deadline)
            if code != 0:
                self._note(f"SIGTERM ends it with exit code {code}")
        except subprocess.TimeoutExpired:
            self._note(f"SIGTERM does not end it within {self._deadline:g} seconds")
            server.process.kill()
        for client in filter(_runs, clients):
            client.join()


def _runs(thread: threading.Thread) -> bool:
    return thread.is_alive()


def _is_alive(server: Server) -> bool:
    try:
        return server.get("/livez").status_code == 200
    except httpx.HTTPError:
        return False


def main() -> int:
    """Try all services, print what came of it, and give exit code 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="in all (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--services", type=int, default=24, help="how many share them (default: 24)")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*USUAL_KINDS], help="of models")
    parser.add_argument("--only", type=int, nargs="+", help="these of the services alone, by number")
    parser.add_argument("--threads", type=int, default=12, help="clients at a time (default: 12)")
    parser.add_argument("--crosstalk", type=int, default=1, help="rounds in each service of beams that leave")
    parser.add_argument("--share", type=float, default=0.15, help="of repeatable requests, that is repeated alone")
    parser.add_argument("--request-timeout", type=float, default=120.0, help="as of serve (default: 120)")
    parser.add_argument("--options", default="", help="further ones of serve, such as '--batch-size 64'")
    parser.add_argument("--show", type=int, default=20, help="failures that are printed (default: 20)")
    parser.add_argument("--failures", type=Path, help="a file that all of them are added to")
    arguments = parser.parse_args()
    console, report, known, started = Console(width=160), Report(), known_options(), time.monotonic()
    setups = make_setups(arguments.seed, arguments.services, arguments.kinds, arguments.request_timeout)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        models = {kind: make_model(folder, kind, arguments.seed) for kind in arguments.kinds}
        for number, setup in enumerate(setups):
            if arguments.only and number not in arguments.only:
                continue
            seed = arguments.seed * 1000 + number
            share = len(range(number, arguments.requests, len(setups)))
            trial = Trial(
                setup,
                models[setup.kind],
                folder,
                known=known,
                seed=seed,
                threads=arguments.threads,
                options=shlex.split(arguments.options),
            )
            before = time.monotonic()
            tried = trial.run(AskMaker(seed, setup).chains(share, arguments.crosstalk), arguments.share)
            told = f"{number}: {setup.kind}, {' '.join(setup.arguments(known)[10:])}"
            console.print(f"{told}: {len(tried.failures)} failures, {time.monotonic() - before:.0f} s", **_PLAIN)
            for failure in tried.failures:
                console.print(f"    {failure.ask.kind if failure.ask else 'service'}: {failure.what[:300]}", **_PLAIN)
            if arguments.failures is not None:
                with arguments.failures.open("a") as file:
                    file.writelines(f"{failure.to_json()}\n" for failure in tried.failures)
            report += tried
    console.print(report.table(), highlight=False)
    for failure in report.failures[: arguments.show]:
        print(failure.to_json())
    print(f"seed {arguments.seed}: {len(report.failures)} failures in {time.monotonic() - started:.0f} s.")
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
