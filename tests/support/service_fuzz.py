"""Random requests of all kinds, many at a time, through the real service on small real models: none may do it harm.

    python -m tests.support.service_fuzz --requests 2000 --seed 1
    python -m tests.support.service_fuzz --requests 2000 --seed 1 --only 5      # one of its services again

Each service serves a random model of one of `USUAL_KINDS` with its own options. Clients send requests of every kind and
size, good and bad; some leave. Each is answered, or refused at once with a sentence, none after its deadline. The
service is then well and at rest, its log has no error, and SIGTERM ends it while requests run. Requests that can be
repeated, sent alone to the same service, and to a fresh one without a prefix cache, get equal tokens, and scores to
1e-3; where llama.cpp's rounding decides between two tokens, an answer counts as "by rounding" when the fresh service
gives it after noise of 1e-5 or 1e-4 was put into its scores. What failed is printed as JSON, and the exit code is 1.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.models import adapter_arguments
from tests.support.service_client import Ask, Outcome, complaint_about, difference, send
from tests.support.service_requests import AskMaker, Chain, texts_of
from tests.support.service_setups import USUAL_KINDS, Setup, make_model, make_setups
from tests.support.services import Server, serving, wait_for

_SLACK = 30.0
"""Seconds after its deadline in which the answer to a request reaches a client of a busy machine."""
_TOLERANCE = 1e-3
_NOISES = (1e-5,) * 10 + (1e-4,) * 10
_MOST_DOUBTS = 5
"""Differences of one service that are looked into; where there are more, it is not rounding."""


class Trial:
    """One service, tried by so many clients at a time; refusals must come within some seconds, whatever the load.

    Attributes:
        counts: how many requests of a kind came to what, as pairs.
        failures: what is not as it should be, as JSON: how to see it again.
    """

    def __init__(
        self, setup: Setup, model: Path, folder: Path, *, seed: int, threads: int = 12, refusal: float = 10.0
    ) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self._setup, self._model, self._folder = setup, model, folder
        self._random, self._threads, self._refusal = random.Random(seed), threads, refusal
        self._deadline = setup.settings.request_timeout + _SLACK
        self._lost, self._lock = threading.Event(), threading.Lock()

    def run(self, chains: list[Chain], share: float) -> None:
        """Send all requests, look at the service, and repeat a share of those that can be repeated."""
        with self.serving() as server:
            with ThreadPoolExecutor(self._threads) as pool:
                sent = pool.map(functools.partial(self._send_chain, server), chains)
                everything = [*itertools.chain.from_iterable(sent)]
            asked = [
                (ask, outcome)
                for ask, outcome in everything
                if ask.repeats and outcome.column in {"answered", "refused", "nothing to choose"}
                if ask.always or self._random.random() < share
            ]
            repeated: list[Outcome] = []
            if not self._lost.is_set() and not self._note(*server.troubles(self._deadline)):
                repeated = [self._send_alone(server, ask) for ask, _ in asked]
                self._note(*server.troubles(self._deadline))
            errors = server.logged_errors()
            self._note(*errors)
            self._stop_while_busy(server, [chain[0] for chain in chains[: self._threads]])
            # llama.cpp logs what is aborted at the end as an error.
            self._note(*[line for line in server.logged_errors()[len(errors) :] if "Traceback" in line])
        if repeated and self._setup.is_exact:
            with self.serving(prefix_cache=False) as fresh:
                self._compare(fresh, asked, repeated)

    def serving(self, **options: Any) -> contextlib.AbstractContextManager[Server]:
        adapters = adapter_arguments(self._model, self._setup.adapters)
        environment = os.environ | self._setup.environment(**options)
        return serving(self._folder, str(self._model), *adapters, store=self._folder, environment=environment)

    def _note(self, *whats: str, ask: Ask | None = None) -> int:
        for what in whats:
            shown = {"what": what, "model": self._setup.kind, "options": self._setup.environment()}
            self.failures.append(
                json.dumps(shown | (asdict(ask) if ask else {}), default=lambda body: repr(body[:200]))
            )
        return len(whats)

    def _send_chain(self, server: Server, chain: Chain) -> list[tuple[Ask, Outcome]]:
        done: list[tuple[Ask, Outcome]] = []
        for planned in chain:
            if self._lost.is_set():
                break
            ask = planned
            if planned.follows and done and (before := done[-1][1].answer) is not None:
                ask = planned.after(done[-1][0], before.text)
            outcome = send(server.port, ask, self._deadline)
            done.append((ask, outcome))
            complaint = complaint_about(ask, outcome, deadline=self._deadline, refusal=self._refusal)
            with self._lock:
                self.counts[ask.kind, outcome.column] += 1
                if complaint:
                    self._note(complaint, ask=ask)
            if complaint and (outcome.status == 0 or server.process.poll() is not None):
                self._lost.set()
        return done

    def _send_alone(self, server: Server, ask: Ask) -> Outcome:
        wait_for(server.is_idle, self._deadline)
        return send(server.port, ask, self._deadline)

    def _compare(self, fresh: Server, asked: list[tuple[Ask, Outcome]], repeated: list[Outcome]) -> None:
        doubts = 0
        for (ask, under_load), afterwards in zip(asked, repeated, strict=True):
            alone = self._send_alone(fresh, ask)
            verdict = "equal"
            for name, outcome in (("under load", under_load), ("alone afterwards", afterwards)):
                if not (found := difference(outcome, alone, _TOLERANCE)):
                    continue
                doubts += 1
                if doubts <= _MOST_DOUBTS and self._is_rounding(fresh, ask, outcome):
                    verdict = "by rounding" if verdict == "equal" else verdict
                    continue
                verdict = "different"
                self._note(f"{name} it is not what a fresh service answers: {found}", ask=ask)
            exact = self._setup.settings.exact_seeds and ask.has_seed
            if exact and (found := difference(under_load, afterwards, 0.0)):
                verdict = "different"
                self._note(f"its seed does not repeat it to the last bit: {found}", ask=ask)
            self.counts[ask.kind, verdict] += 1

    def _is_rounding(self, fresh: Server, ask: Ask, outcome: Outcome) -> bool:
        given = ask.kwargs.get("sequence_bias") or []
        biased = {phrase[0] for phrase, _ in given if len(phrase) == 1}
        tokens = sorted(set(range(1, len(texts_of(self._setup.kind)))) - biased)
        for noise in _NOISES if outcome.answer is not None else ():
            biases = [[[token], self._random.gauss(0.0, noise)] for token in tokens]
            noisy = self._send_alone(fresh, ask.asking(sequence_bias=given + biases))
            if not difference(outcome, noisy, 10 * _TOLERANCE):
                return True
        return False

    def _stop_while_busy(self, server: Server, asks: list[Ask]) -> None:
        """Send SIGTERM while requests run; the process ends with 0 within its grace period and a while."""
        with ThreadPoolExecutor(self._threads) as pool:
            if not self._lost.is_set():
                sent = [pool.submit(send, server.port, ask, self._deadline) for ask in asks]
                wait_for(lambda: bool(server.metrics()["num_requests_running"]) or all(each.done() for each in sent))
            try:
                code, _ = server.stop(patience=self._deadline)
                self._note(*[f"SIGTERM ends it with exit code {code}"] * (code != 0))
            except subprocess.TimeoutExpired:
                self._note(f"SIGTERM does not end it within {self._deadline:g} seconds")
                server.process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="how many, over all services (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of services and requests (default: 0)")
    parser.add_argument("--services", type=int, default=24, help="how many share them (default: 24)")
    parser.add_argument("--only", type=int, nargs="+", help="try these services alone, by their numbers")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        models = {kind: make_model(folder, kind, arguments.seed) for kind in USUAL_KINDS}
        for number, setup in enumerate(make_setups(arguments.seed, arguments.services)):
            if arguments.only and number not in arguments.only:
                continue
            seed = arguments.seed * 1000 + number
            count = len(range(number, arguments.requests, arguments.services))
            trial = Trial(setup, models[setup.kind], folder, seed=seed)
            trial.run(AskMaker(seed, setup).chains(count, crosstalk=int(count > 40)), share=0.15)
            print(f"{number}: {setup}: {len(trial.failures)} failures", flush=True)
            counts += trial.counts
            failures += trial.failures
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{count:8} {kind}: {outcome}")
    print(*failures, f"seed {arguments.seed}: {len(failures)} failures", sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
