"""``edge-phi3 bench``: measure what is served, and what could be."""

from __future__ import annotations

import rich_click as click

from edge_phi3.commands import bench_quants, bench_serve


@click.group("bench", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Measure a running service, or the quantisations of a model.

    Example: `edge-phi3 bench serve http://127.0.0.1:8080 --clients 1,4,16`

    Another: `edge-phi3 bench quants phi-3-mini-4k-f16.gguf --type Q4_K_M --type Q8_0`
    """


command.add_command(bench_serve.command)
command.add_command(bench_quants.command)
