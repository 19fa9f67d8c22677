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
import functools
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.support.service_client import CHAT, Ask, Outcome, column_of, complaint_about, difference, send
from tests.support.service_requests import VOCABULARY, WORDS, AskMaker, Chain
from tests.support.service_setups import USUAL_KINDS, Setup, make_model, make_setups
from tests.support.services import Server, serving, wait_for

_SLACK = 30.0
"""Seconds after its deadline in which the answer to a request reaches a client of a busy machine."""
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
        """Return it as one line."""
        shown: dict[str, Any] = {"what": self.what, "model": self.setup.kind, "options": self.options}
        if self.ask is not None:
            body = self.ask.body if isinstance(self.ask.body, dict) else repr(self.ask.body[:200])
            shown |= {"kind": self.ask.kind, "leaves": self.ask.leaves, "path": self.ask.path, "body": body}
        return json.dumps(shown)


@dataclass
class Report:
    """What came of all requests."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def __iadd__(self, other: Report) -> Self:
        self.counts += other.counts
        self.failures += other.failures
        return self


class Trial:
    """One service, tried.

    Args:
        setup: its kind and options.
        model: the GGUF.
        folder: where logs go.
        seed: of all that is random.
        threads: clients at a time.
        refusal: seconds in which a refusal must come, whatever the load.
    """

    def __init__(
        self,
        setup: Setup,
        model: Path,
        folder: Path,
        *,
        seed: int,
        threads: int = 12,
        refusal: float = 10.0,
    ) -> None:
        self.report = Report()
        self._setup = setup
        self._model = model
        self._folder = folder
        self._random = random.Random(seed)
        self._threads = threads
        self._refusal = refusal
        self._deadline = setup.request_timeout + _SLACK
        self._options, self._fresh_options = setup.arguments(), setup.arguments(prefix_cache=False)
        self._lost = threading.Event()
        self._lock = threading.Lock()

    def run(self, blocks: Sequence[list[Chain]], share: float) -> Report:
        """Send all requests, look at the service, and repeat a share of those that can be repeated."""
        with self._serving(self._options) as server:
            done = self._send_all(server, [*itertools.chain.from_iterable(blocks)])
            asked = [
                (ask, outcome)
                for ask, outcome in done
                if ask.repeats and outcome.has_decided and (ask.always or self._random.random() < share)
            ]
            repeated: list[Outcome] = []
            if not self._lost.is_set() and not self._note_all(server.troubles(self._deadline)):
                repeated = [self._send_alone(server, ask) for ask, _ in asked]
                self._note_all(server.troubles(self._deadline))
            errors = server.logged_errors()
            self._note_all(errors)
            self._stop_while_busy(server)
            # llama.cpp logs what is aborted at the end as an error.
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

    def _send_all(self, server: Server, chains: list[Chain]) -> list[tuple[Ask, Outcome]]:
        with ThreadPoolExecutor(self._threads) as pool:
            pairs = pool.map(functools.partial(self._send_chain, server), chains)
            return [*itertools.chain.from_iterable(pairs)]

    def _send_chain(self, server: Server, chain: Chain) -> list[tuple[Ask, Outcome]]:
        done: list[tuple[Ask, Outcome]] = []
        for planned in chain:
            if self._lost.is_set():
                break
            ask = planned
            if planned.follows and done and done[-1][1].answer is not None:
                ask = planned.after(done[-1][0], done[-1][1].answer.text)
            outcome = send(server.port, ask, self._deadline)
            done.append((ask, outcome))
            complaint = complaint_about(ask, outcome, deadline=self._deadline, refusal=self._refusal)
            with self._lock:
                self.report.counts[ask.kind, column_of(outcome)] += 1
                if complaint:
                    self._note(complaint, ask)
            if complaint and (outcome.status == 0 or not server.is_alive()):
                self._lost.set()
        return done

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
        bodies = [
            {"prompt": word, "stream": beams == 1, "generate_kwargs": endless | {"num_beams": beams}}
            for word, beams in zip(WORDS, (1, 1, 4, 1, 4, 1), strict=False)
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            if not self._lost.is_set():
                asks = [Ask("at the end", CHAT, body) for body in bodies]
                sent = [pool.submit(send, server.port, ask, self._deadline) for ask in asks]
                wait_for(lambda: bool(server.metrics()["num_requests_running"]) or all(each.done() for each in sent))
            try:
                code, _ = server.stop(patience=self._deadline)
                if code != 0:
                    self._note(f"SIGTERM ends it with exit code {code}")
            except subprocess.TimeoutExpired:
                self._note(f"SIGTERM does not end it within {self._deadline:g} seconds")
                server.process.kill()


def main() -> int:
    """Try all services, print what came of it, and return exit code 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="how many, over all services (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of services and requests (default: 0)")
    parser.add_argument("--services", type=int, default=24, help="how many share them (default: 24)")
    parser.add_argument("--only", type=int, nargs="+", help="try these services alone, by their numbers")
    arguments = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        models = {kind: make_model(folder, kind, arguments.seed) for kind in USUAL_KINDS}
        for number, setup in enumerate(make_setups(arguments.seed, arguments.services)):
            if arguments.only and number not in arguments.only:
                continue
            seed = arguments.seed * 1000 + number
            count = len(range(number, arguments.requests, arguments.services))
            trial = Trial(setup, models[setup.kind], folder, seed=seed)
            tried = trial.run(AskMaker(seed, setup).chains(count, crosstalk=1), share=0.15)
            print(f"{number}: {setup}: {len(tried.failures)} failures", flush=True)
            report += tried
    for (kind, outcome), count in sorted(report.counts.items()):
        print(f"{count:8} {kind}: {outcome}")
    for failure in report.failures:
        print(failure.to_json())
    print(f"seed {arguments.seed}: {len(report.failures)} failures")
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
