"""``edge-phi3 bench``: measure what is served."""

from __future__ import annotations

import rich_click as click

from edge_phi3.commands import bench_serve


@click.group("bench", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure a running service.

    Example: `edge-phi3 bench serve http://127.0.0.1:8080 --clients 1,4,16`
    """


command.add_command(bench_serve.command)
