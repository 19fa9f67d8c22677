"""``edge-phi3 bench``: measurements."""

from __future__ import annotations

import rich_click as click

from edge_phi3.commands.bench_serve import command as serve


@click.group("bench", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure quantised models and running services."""


command.add_command(serve)
