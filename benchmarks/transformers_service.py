"""The way of the original service, to compare with: transformers' text-generation pipeline behind ``POST /chat``.

    python -m benchmarks.transformers_service CHECKPOINT --port 8081

One pipeline in bfloat16; each request is generated in a thread of its own, and none shares a batch with another, as the
original does it. What the load generator needs besides is here too: token counts, and ``POST /tokenize``. Needs torch
and transformers, and nothing of this product.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


class Server(ThreadingHTTPServer):
    """Holds the pipeline that all requests use."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, checkpoint: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.bfloat16).to(device)
        self.pipeline = pipeline("text-generation", model=model, tokenizer=self.tokenizer, device=device)
        super().__init__(("127.0.0.1", port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    # Head and body are written one after the other: the body must not wait until the head is acknowledged.
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Say that the model is loaded."""
        self._reply({"status": "ready"})

    def do_POST(self) -> None:
        """Generate, or count tokens."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._reply({"count": len(self.server.tokenizer(body["text"])["input_ids"])})
        else:
            self._reply(self._generate(body))

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        kwargs = dict(body["generate_kwargs"])
        kwargs.pop("return_dict_in_generate", None)
        kwargs.pop("seed", None)
        found = self.server.pipeline(body["prompt"], return_tensors=True, **kwargs)
        tokens = found[0]["generated_token_ids"]
        prompt = len(self.server.tokenizer(body["prompt"])["input_ids"])
        text = self.server.tokenizer.decode(tokens[prompt:], skip_special_tokens=True)
        return {"Result": text, "usage": {"prompt_tokens": prompt, "completion_tokens": len(tokens) - prompt}}

    def _reply(self, content: dict[str, Any]) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - http.server's name
        """Write no line for each request."""


def main() -> None:
    """Load, and serve until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    Server(arguments.port, arguments.checkpoint).serve_forever()


if __name__ == "__main__":
    main()
