"""What planning may raise beside the errors of the parts that it calls."""

from __future__ import annotations

from edge_phi3.errors import EdgePhi3Error


class PlanningError(EdgePhi3Error):
    """A model whose memory cannot be planned as asked."""
