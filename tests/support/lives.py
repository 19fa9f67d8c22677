"""Lives of an engine on contexts that compute nothing: one thread, an injected clock, and checks after every step."""

import itertools
import logging
from collections import Counter

from edge_phi3.engine.errors import DeadlineExceededError, EngineStoppedError, QueueFullError, RequestTooLargeError
from edge_phi3.engine.model_runner import ModelRunner
from edge_phi3.engine.sequence import FinishedEvent, RunningRequest
from edge_phi3.generation import GenerationError
from edge_phi3.llama import DecodeFailedError
from tests.support.clients import Client
from tests.support.cores import CheckedHostCache, audit, make_core
from tests.support.scenarios import Scenario

ADMISSION, EARLY = "admissions beside others", "of them preempted before a token"
"""What the counter of a life holds beside 1 for each thing that it met: how often a request entered a context in which
others ran, and how many of those that did were preempted before a token was chosen for them."""


def check_admissions(met: Counter[str]) -> None:
    """Check, over some hundred lives, that requests are admitted only where they have room until they decode.

    How many steps that takes is estimated, so a few are preempted before: 1 in 100. Without the estimate, or without
    the cells that other prompts still take, it is 5 and more.
    """
    assert met[EARLY] <= met[ADMISSION] / 50, f"{met[EARLY]} of {met[ADMISSION]} requests are admitted too early"


def live(scenario: Scenario) -> Counter[str]:
    """Live a scenario in one thread; return `ADMISSION`, `EARLY`, and 0 or 1 for each of what `Life` looks for."""
    return Life(scenario).run()


class Life:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 1.0
        self.core, self.contexts = make_core(scenario, lambda: self.now)
        self.scheduler = self.core.scheduler
        self.clients: list[Client] = []
        for number, ask in enumerate(scenario.asks):
            self.clients.append(Client(number, ask, scenario, self.clients, lambda: self.now))
        self.steps = 0
        self.stopped = self.stopped_busy = self.broken = False
        self.met: Counter[str] = Counter()
        self._stood: dict[int, int] = {}
        self._waited: dict[tuple[int, int], int] = {}
        """Steps that the requests of an adapter, which run in a context, have waited for their turn."""
        self._entered: set[tuple[int, int]] = set()
        """The contexts and arrivals of requests that were admitted in this step."""
        self._admitted: dict[int, int | None] = {}
        """The length of each request when it was last admitted beside others; None when it was admitted alone."""

    def run(self) -> Counter[str]:
        logging.disable()  # lives meet thousands of errors on purpose
        try:
            return self._run()
        finally:
            logging.disable(logging.NOTSET)

    def _run(self) -> Counter[str]:
        self._watch_admissions()
        asks = self.scenario.asks
        last = max((ask.arrives for ask in asks), default=0)
        number = 0
        while not self.stopped and (self.core.in_flight or number <= last):
            self._events(number)
            if not self.stopped and self.core.in_flight:
                self._step()
            self.now += 1.0
            number += 1
        self._check_end()
        self._count()
        return self.met

    def _events(self, number: int) -> None:
        for client in self.clients:
            if client.ask.arrives == number:
                client.submit(self.core)
            leaves = client.ask.leaves
            if leaves is not None and client.in_flight and client.ask.arrives + leaves == number:
                assert client.running is not None
                client.cancelled = True
                self.core.cancel(client.running)
        if self.scenario.stop_at == number:
            self._stop()

    def _stop(self) -> None:
        self.stopped_busy = self.core.in_flight > 0
        self.core.stop("The service is stopping.")
        self.stopped = True
        for client in self.clients:
            if not client.accepted and client.refusal is None:
                client.submit(self.core)
                refused = (EngineStoppedError, RequestTooLargeError)
                assert isinstance(client.refusal, refused), f"{client.refusal!r} of a stopped engine"

    def _step(self) -> None:
        core, clients = self.core, self.clients
        running, progress = self._running(), self._progress()
        failures = [len(context.failed) for context in self.contexts]
        started = {client.number for client in clients if client.ended}
        lengths, traces, preemptions = self._lengths(), self._traces(), self.scheduler.preemptions
        self._entered.clear()
        if not self._take_step():
            self._stop()
            return
        alone = [2 * client.rows * client.length + 2 for client in clients if client.accepted]
        most = (1 + len(alone) + len(self.scenario.failures)) * sum(alone) + 10  # more than they can take
        assert self.steps <= most, "the engine takes no end of steps"
        assert progress != self._progress(), "a step did nothing"
        news = [client for client in clients if client.ended and client.number not in started]
        for client in news:
            client.check_events()
        self._check_preempted(running, failures, preemptions, news)
        self._check_exact(running, traces, news)
        if failures == [len(context.failed) for context in self.contexts]:
            stuck = {arrival for arrival, length in self._lengths().items() if lengths.get(arrival) == length}
            self._stood = {arrival: self._stood.get(arrival, 0) + 1 for arrival in stuck}
            # Halves of a batch take turns, and those who are new come first; so do prompts, before each of them. Each
            # adapter waits for one turn of every other, and may need some of its own for all its halves.
            turn, adapters = self.scenario.turn, len({ask.adapter for ask in self.scenario.asks})
            most = 7 if self.scenario.sizes else 0
            most += (1 + most // turn) * (adapters - 1) * turn
            assert max(self._stood.values(), default=0) <= most, f"{self._stood} decode, but did not go on"
        self._check_failures(failures, news)
        self._check_turns()
        self._check_cells()
        waits = sum(client.in_flight for client in clients)
        assert core.in_flight == waits, f"{core.in_flight} requests are in flight for the engine, {waits} for those"

    def _check_turns(self) -> None:
        """Check that each adapter waits for one turn of every other at most."""
        most = (len({ask.adapter for ask in self.scenario.asks}) - 1) * self.scenario.turn
        waiting: dict[tuple[int, int], int] = {}
        for place, runner in enumerate(self.scheduler.runners):
            for key in {(place, request.request.adapter) for request in runner.running}:
                waiting[key] = 0 if key[1] == runner._adapter else self._waited.get(key, 0) + 1
        self._waited = waiting
        assert max(waiting.values(), default=0) <= most, f"{waiting} wait for their turn"

    def _take_step(self) -> bool:
        """Let the engine take a step; False when it cannot go on."""
        try:
            self.core.step()
        except DecodeFailedError:
            assert any(context.broken for context in self.contexts), "a context works, but the engine is broken"
            self.broken = True
            return False
        self.steps += 1
        return True

    def _progress(self) -> tuple[object, ...]:
        computed = sum(context.decoded for context in self.contexts)
        places = [len(runner.running) for runner in self.scheduler.runners]
        lengths = [client.running.length for client in self.clients if client.running is not None]
        failed = sum(len(context.failed) for context in self.contexts)
        return (computed, self.core.in_flight, self.scheduler.preemptions, places, lengths, failed)

    def _place(self, client: Client) -> int:
        assert client.running is not None
        return min(self.scenario.attention.rotary(client.running.length), len(self.contexts) - 1)

    def _running(self) -> list[set[int]]:
        return [{request.arrival for request in runner.running} for runner in self.scheduler.runners]

    def _queues(self) -> list[list[Client]]:
        """Return who waits for each context."""
        running = set(itertools.chain(*self._running()))
        in_flight = [(each, each.running) for each in self.clients if each.in_flight and each.running is not None]
        # Who has finished hears of it in the next step, while the device computes.
        waiting = [
            each for each, request in in_flight if request.arrival not in running and not request.decoder.finished
        ]
        return [[each for each in waiting if self._place(each) == place] for place in range(len(self.contexts))]

    def _watch_admissions(self) -> None:
        """Check of each request that is admitted that nobody who came earlier waits for the same context."""
        enter = self.scheduler._enter

        def watched(request: RunningRequest, runner: ModelRunner) -> None:
            place = self.scheduler.runners.index(runner)
            first = min(client.running.arrival for client in self._queues()[place] if client.running is not None)
            assert first == request.arrival, f"{request.arrival} overtakes {first}"
            self._entered.add((place, request.arrival))
            self._admitted[request.arrival] = request.length if runner.running else None
            self.met[ADMISSION] += bool(runner.running)
            enter(request, runner)

        self.scheduler._enter = watched  # type: ignore[method-assign]

    def _lengths(self) -> dict[int, int]:
        return {request.arrival: request.length for request in self.scheduler.running if request.decoding}

    def _traces(self) -> list[tuple[int, int, int]]:
        """Return how often each context was emptied, its host cache was given a sequence, and a batch was filled up."""
        caches = [runner.kv.host_cache for runner in self.scheduler.runners]
        saves = [cache.saves if isinstance(cache, CheckedHostCache) else 0 for cache in caches]
        return [(each.clears, count, each.padded) for each, count in zip(self.contexts, saves, strict=True)]

    def _check_exact(self, before: list[set[int]], traces: list[tuple[int, int, int]], news: list[Client]) -> None:
        """Check that requests that run alone do so in an emptied context, and leave nothing behind."""
        ended_exact = all(client.running is None or client.running.exact for client in news)
        for place, runner in enumerate(self.scheduler.runners):
            exact = {request.arrival for request in runner.running if request.exact}
            assert not exact or len(runner.running) == 1, "a request that wants a context to itself has none"
            (clears, saves, padded), (cleared, saved, filled) = traces[place], self._traces()[place]
            assert not exact or filled == padded, "what repeats to the bit depends on what was measured"
            assert cleared > clears or not exact - before[place], "a request with a seed began in a used context"
            alone = before[place] and before[place] <= self._exact and ended_exact
            # Others may have come, run and left within the step.
            others = {arrival for context, arrival in self._entered if context == place} - self._exact
            assert saved == saves or not alone or others, "a request with a seed left a prefix behind"

    @property
    def _exact(self) -> set[int]:
        found = [client.running for client in self.clients if client.running is not None]
        return {request.arrival for request in found if request.exact}

    def _check_preempted(
        self, before: list[set[int]], failures: list[int], preemptions: int, news: list[Client]
    ) -> None:
        """Check that those who were preempted are counted, and had come after all who stayed."""
        preempted = 0
        for place, running in enumerate(self._running()):
            if len(self.contexts[place].failed) > failures[place]:
                return  # who was not in the failed batch is sent back too
            requests = [client.running for client in self._queues()[place] if client.running is not None]
            waiting = {request.arrival: request for request in requests}
            back = {arrival for arrival in waiting if arrival in before[place] or (place, arrival) in self._entered}
            preempted += len(back)
            assert not back or not running or min(back) > max(running), f"{back} were sent back, {running} stayed"
            self.met[EARLY] += sum(waiting[arrival].length == self._admitted[arrival] for arrival in back)
        counted = self.scheduler.preemptions - preemptions
        # What cannot be sent fails while the device computes, after the preemptions of the step.
        gone = sum(client.ask.fault == "send" for client in news)
        assert preempted <= counted <= preempted + gone, f"{counted} preemptions are counted, {preempted} took place"

    def _check_failures(self, before: list[int], news: list[Client]) -> None:
        """Check that a failed batch fails those who had tokens in it, and nobody else."""
        failed = [client for client in news if isinstance(client.final, DecodeFailedError)]
        batches = [context.failed[count:] for context, count in zip(self.contexts, before, strict=True)]
        hit: set[int] = set()
        for batch in itertools.chain(*batches):
            for seq_id, entries in itertools.groupby(batch, key=lambda entry: entry[0]):
                if seq_id == self.contexts[0].scratch:
                    continue  # what only fills a batch up
                tokens = [(position, token) for _, position, token in entries]
                who = [client.number for client in failed if all(client.holds(*each) for each in tokens)]
                left = any(client.cancelled for client in self.clients)
                # What cannot be sent has failed before.
                left = left or any(client.ask.fault == "send" for client in news)
                assert who or left, f"sequence {seq_id} was in a batch that failed, but its request did not"
                hit.update(who)
        assert hit == {client.number for client in failed}, f"of {failed} only {hit} had tokens in a batch that failed"

    def _check_cells(self) -> None:
        for context, runner in zip(self.contexts, self.scheduler.runners, strict=True):
            kv = runner.kv
            assert not context.violations, context.violations
            assert not context.refused, "the engine decoded more tokens than there were free cells"
            audit(kv)
            taken = kv.cells - kv.free
            assert taken == context.used, f"the engine counts {taken} used cells, the context {context.used}"
            ranges = list(zip(kv.start, kv.length, strict=True))
            held = sum(end - start for start, end in ranges)
            assert held == context.held, f"the engine counts {held} held positions, the context {context.held}"
            taken = kv.sequences - len(kv._free_ids) - len(kv._kept)
            rows = sum(request.rows for request in runner.running)
            assert taken <= rows, f"{taken} sequences are taken, by {rows} rows at most"

    def _check_end(self) -> None:
        core, scheduler = self.core, self.scheduler
        for client in self.clients:
            assert not client.in_flight, f"request {client.number} was never answered"
            client.check_events()
        errors = [client.final for client in self.clients if isinstance(client.final, BaseException)]
        assert len({id(error) for error in errors}) == len(errors), "one exception is sent to several requests"
        assert core.in_flight == 0, "requests are in flight for the engine alone"
        assert not scheduler.waiting, "requests wait after the end"
        assert not scheduler.running, "requests run after the end"
        if not self.stopped:
            self._check_cells()
            for _ in range(2000):  # copies that are bounded go on
                if core.has_work:
                    core.step()
            assert not core.has_work, "the engine never comes to rest"
            self._check_cells()
            for context, runner in zip(self.contexts, scheduler.runners, strict=True):
                assert runner.kv.used == 0, "cells are used after the end"
                runner.kv.make_room(runner.kv.cells)
                assert len(runner.kv._free_ids) == runner.kv.sequences, "sequences are taken after the end"
                assert context.used == 0, "cells are held after the end"

    def _count(self) -> None:
        clients, contexts = self.clients, self.contexts
        ends = [(client, client.final) for client in clients if isinstance(client.final, FinishedEvent)]
        restored = any(context.restored for context in contexts)
        met = {
            "preemption": self.scheduler.preemptions > 0,
            "trimming": any(context.trims for context in contexts),
            "crossing": any(client.expected.crosses for client, _ in ends),
            "restore": restored,
            "shared prefix": not restored and any(end.cached_tokens > 0 for _, end in ends),
            "forks": any(client.expected.forks for client, _ in ends),
            "decode failure": any(context.failed for context in contexts),
            "broken": self.broken,
            "cancel": any(client.cancelled for client in clients),
            "deadline": any(isinstance(client.final, DeadlineExceededError) for client in clients),
            "exact seed": self.scenario.exact_seeds and any(client.config.seed is not None for client, _ in ends),
            "stop": self.stopped_busy,
            "refusal": any(client.refusal is not None for client in clients),
            "full queue": any(isinstance(client.refusal, QueueFullError) for client in clients),
            "fault": any(client.fired for client in clients),
            "generation error": any(isinstance(client.final, GenerationError) for client in clients),
            "max time": any("time" in end.result.finish_reasons for _, end in ends),
            "scored prompt": any(len(end.prompt_logprobs) > 0 for _, end in ends),
            "drafts": any(end.accepted_tokens for _, end in ends),
            "beams": any(client.config.is_beam_search for client, _ in ends),
            "turns of adapters": any(context.switches > 1 for context in contexts),
        }
        self.met.update({kind: int(found) for kind, found in met.items()})
