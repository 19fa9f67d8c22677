"""What pytest-benchmark has measured."""

from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.stats import Stats


def timings(benchmark: BenchmarkFixture) -> Stats:
    """Return the statistics over the rounds of a benchmark that has run."""
    assert benchmark.stats is not None
    stats: Stats = benchmark.stats.stats
    return stats
