"""Gives every Python process that has this folder in PYTHONPATH the device that its environment names."""

import os
import sys

from rpc_plugin import ENDPOINT, PLUGIN, RpcBackend

# The quantiser computes nothing on a device, and may run while its parent has this one, which serves one at a time.
_WITHOUT = "edge_phi3.llama.quantize_worker"

if ENDPOINT in os.environ and _WITHOUT not in sys.orig_argv:
    RpcBackend(os.environ[PLUGIN]).register(os.environ[ENDPOINT])
