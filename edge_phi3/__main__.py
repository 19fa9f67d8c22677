"""``python -m edge_phi3`` is the ``edge-phi3`` command."""

from edge_phi3.cli import main

main()
