"""A stand-in for the service that edge-phi3 replaces: transformers behind ``POST /chat``, one generation at a time.

    python benchmarks/original_service.py CHECKPOINT --port 8090 --dtype bfloat16

It needs torch and transformers, so it is run by an interpreter that has them (``--torch-python`` of
`benchmarks.engine_ratios`), and needs nothing of edge-phi3. The model runs as the original runs it: a text-generation
model in half precision, on the GPU when there is one, called with the request's generation parameters; requests that
arrive together wait for each other.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Original:
    """The model and its tokenizer, used by one request at a time."""

    def __init__(self, checkpoint: str, dtype: str, threads: int) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()
        self._turn = threading.Lock()

    def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer ``POST /tokenize``, which the load generator measures its words with."""
        tokens = self._tokenizer(body["text"])["input_ids"]
        return {"tokens": tokens, "count": len(tokens)}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer ``POST /chat`` with the new text, and the counts that the load generator wants."""
        inputs = self._tokenizer(body["prompt"], return_tensors="pt").to(self._device)
        with self._turn, torch.inference_mode():
            output = self._model.generate(**inputs, **body.get("generate_kwargs", {}))
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        usage = {"prompt_tokens": inputs["input_ids"].shape[1], "completion_tokens": len(new)}
        return {"Result": self._tokenizer.decode(new, skip_special_tokens=True), "usage": usage}


def handler_of(original: Original) -> type[BaseHTTPRequestHandler]:
    """Give the class that answers requests with a model."""
    routes = {"/chat": original.chat, "/tokenize": original.tokenize}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(200, {"status": "Healthy"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = routes.get(self.path)
            if answer is None:
                self._reply(404, {"detail": "Not Found"})
            else:
                self._reply(200, answer(body))

        def _reply(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    """Load, and serve until the process is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    handler = handler_of(Original(arguments.checkpoint, arguments.dtype, arguments.threads))
    ThreadingHTTPServer(("127.0.0.1", arguments.port), handler).serve_forever()


if __name__ == "__main__":
    main()
