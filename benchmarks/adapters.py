"""What adapters cost: a switch from one to another, and sixteen clients of three adapters and none.

    python -m benchmarks.adapters [MODEL.gguf]

A switch is measured in processor time of the calling thread, on a model of 32 narrow layers with one thread: what a
step after a switch takes more than the next one. The clients' model is of Phi-3-mini's widths with 4 of its layers.
"""

import argparse
import functools
import queue
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model
from edge_phi3.llama.options import ContextOptions, Lora
from tests.golden.checkpoints import write_checkpoint
from tests.support.models import model_path, random_adapter

CLIENTS, PROMPT, NEW, TURNS = 16, 60, 64, 3
GREEDY: dict[str, object] = {"do_sample": False, "max_length": None, "max_new_tokens": NEW, "eos_token_id": []}


def switch(folder: Path) -> float:
    """Return the seconds that a switch takes."""
    checkpoint = write_checkpoint(folder / "deep", layers=32, hidden_size=64, heads=4)
    model = Model(convert(checkpoint, folder / "deep.gguf", outtype="f32").path)
    model.load_lora(random_adapter(folder / "deep-adapter.gguf", model.path, 1), 0.01, 1)
    context = Context(model, cells=8192, sequences=16, settings=ContextOptions(threads=1))
    context.warm_up()
    more: list[float] = []
    for position in range(0, 80, 2):
        context.adapt(position // 2 % 2)
        seconds = []
        for place in (position, position + 1):
            context.positions[0] = place
            started = time.thread_time()
            context.decode(1, 1)
            seconds.append(time.thread_time() - started)
        more.append(seconds[0] - seconds[1])
    context.close()
    model.close()
    return statistics.median(more)


def clients(engine: Engine, adapters: int) -> tuple[float, float]:
    """Return the tokens per second of clients who ask together for so many adapters, none among them; the longest wait.

    That is for a token, the first included.
    """
    config, chance = GenerationConfig.resolve(GREEDY, engine.model.defaults), np.random.default_rng(0)
    came: queue.SimpleQueue[tuple[int, float, Event]] = queue.SimpleQueue()
    started = time.perf_counter()

    def note(client: int, event: Event) -> None:
        came.put((client, time.perf_counter(), event))

    for client in range(CLIENTS):
        prompt = chance.integers(300, 3000, PROMPT, dtype=np.int32)
        request = GenerationRequest(prompt, config, stream=True, adapter=client % adapters)
        engine.submit(request, functools.partial(note, client))
    last, longest, ended = dict.fromkeys(range(CLIENTS), started), 0.0, 0
    while ended < CLIENTS:
        client, now, event = came.get()
        longest, last[client] = max(longest, now - last[client]), now
        ended += isinstance(event, FinishedEvent)
    return CLIENTS * NEW / (time.perf_counter() - started), longest


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF file to measure instead")
    given: Path | None = parser.parse_args().model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"a switch takes {switch(folder) * 1000:.1f} ms")
        model = given or model_path("wide")
        lora = tuple(Lora(random_adapter(folder / str(i), model, i), 0.01, str(i)) for i in (1, 2, 3))
        engine = Engine(EngineSettings(model, lora=lora))
        engine.load()
        clients(engine, 1)
        for turn in range(TURNS):
            for adapters in (1, 4):
                speed, longest = clients(engine, adapters)
                print(f"turn {turn}, {adapters - 1} adapters: {speed:.1f} tokens/s, longest wait {longest:.2f} s")
        engine.close()


if __name__ == "__main__":
    main()
