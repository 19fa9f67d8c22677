"""The figures of a load level, with the meanings that vLLM's and llama.cpp's benchmarks give them."""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from edge_phi3.bench.load import Level, RequestRecord


class Distribution(msgspec.Struct, frozen=True):
    """Seconds, over all requests (or pieces) of a level."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a level. Rates count finished requests only.

    Attributes:
        seconds: from the first request to the end of the last.
        tokens_per_second: generated tokens over `seconds`.
        total_tokens_per_second: prompt tokens counted as well; None where the server does not report them.
        prompt_tokens: mean of a request, or None.
        completion_tokens: mean of a request.
        counted: whether the server reported every request's tokens; if not, pieces of text were counted.
        cached_share: share of prompt tokens that came from a cache, or None.
        first_token: from sending a request to the first piece of its answer (TTFT).
        per_token: of one request, seconds per token after the first (TPOT).
        gap: between two pieces of one answer (inter-token latency).
        latency: from sending a request to the end of its answer.
        generator_cores: processor cores that the load generator kept busy.
    """

    clients: int | None
    rate: float | None
    requests: int
    failed: int
    errors: dict[str, int]
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    total_tokens_per_second: float | None
    prompt_tokens: float | None
    completion_tokens: float
    counted: bool
    cached_share: float | None
    first_token: Distribution | None
    per_token: Distribution | None
    gap: Distribution | None
    latency: Distribution | None
    generator_cores: float


def summarise(level: Level, records: Sequence[RequestRecord], cpu_seconds: float) -> Summary:
    """Return the figures of a level, which took so many processor seconds of the load generator."""
    finished = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    seconds = max((record.started + record.latency for record in records), default=0.0)
    generated = sum(record.completion_tokens for record in finished)
    prompts = [record.prompt_tokens for record in finished if record.prompt_tokens is not None]
    cached = [record.cached_tokens for record in finished if record.cached_tokens is not None]
    all_prompts = len(prompts) == len(finished) > 0
    return Summary(
        clients=level.clients,
        rate=level.rate,
        requests=len(finished),
        failed=len(errors),
        errors=dict(Counter(errors).most_common()),
        seconds=seconds,
        requests_per_second=len(finished) / seconds if finished else 0.0,
        tokens_per_second=generated / seconds if finished else 0.0,
        total_tokens_per_second=(generated + sum(prompts)) / seconds if all_prompts else None,
        prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        completion_tokens=generated / len(finished) if finished else 0.0,
        counted=all(record.counted for record in finished),
        cached_share=sum(cached) / sum(prompts) if cached and all_prompts else None,
        first_token=_distribution(record.first for record in finished if record.first is not None),
        per_token=_distribution(filter(None, map(per_token, finished))),
        gap=_distribution(gap for record in finished for gap in record.gaps),
        latency=_distribution(record.latency for record in finished),
        generator_cores=cpu_seconds / seconds if records else 0.0,
    )


def per_token(record: RequestRecord) -> float | None:
    """Return a request's seconds per token after the first, or None when it has only one or was not streamed.

    The first piece is taken to be the first token and the last piece to be the last one.
    """
    if record.first is None or record.completion_tokens < 2:
        return None
    return sum(record.gaps) / (record.completion_tokens - 1)


def _distribution(values: Iterable[float]) -> Distribution | None:
    listed = list(values)
    if not listed:
        return None
    p50, p90, p95, p99 = np.percentile(listed, [50, 90, 95, 99]).tolist()
    return Distribution(float(np.mean(listed)), p50, p90, p95, p99, max(listed))
