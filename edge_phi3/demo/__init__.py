"""The bundled demo model: a small Phi-3 that recites docstrings, to try, test and measure everything else with."""

from pathlib import Path

DEMO_CHECKPOINT: Path = Path(__file__).with_name("phi-3-demo")
"""The folder of the demo model's Hugging Face checkpoint. Its `README.md` is the model card."""
