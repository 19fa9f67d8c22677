"""A front of ``edge-phi3 pull``, which takes the same arguments.

python scripts/convert_and_quantize.py phi-3-mini-4k-instruct --quant Q4_K_M --quant Q8_0 --output-dir models
"""

import sys

from edge_phi3.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "pull")
    main()
