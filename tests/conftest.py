"""Property tests are neither in a hurry nor different from run to run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine is no failure. `--hypothesis-profile random` looks for new examples.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("random"), derandomize=True)
settings.load_profile("fixed")
