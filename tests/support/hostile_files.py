"""Hostile files by the thousand: mutants of what people bring, each given to a verb in a process of its own.

``python -m tests.support.hostile_files --mutants 20000`` takes under an hour on two cores: every verb is forked from a
process that has imported all of it, and so are its workers. A verb ends in a sentence or does its work: no traceback,
no signal, no more than 20 s of processor time, no more than 1 GiB of memory, and no file but its output.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edge_phi3 import cli
from edge_phi3.commands import convert, fit, imatrix, quantize, serve  # noqa: F401 - imported once for all mutants
from edge_phi3.commands.loading import load_pipeline
from edge_phi3.conversion.convert import convert as convert_checkpoint
from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, write_imatrix
from edge_phi3.gguf_file import read_gguf
from edge_phi3.llama import memory_worker, proof, quantize_worker  # noqa: F401 - as above
from edge_phi3.llama.options import Lora
from edge_phi3.process import sentence_of
from edge_phi3.settings import Settings
from tests.golden.checkpoints import write_checkpoint
from tests.support.models import write_adapter

_SECONDS, _MEMORY = 20, 1 << 30
_NUMBERS = [0, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
_FLOATS = [struct.pack("<f", x) for x in (float("nan"), float("inf"), -1.0, 0.0, 1e-45, 3e38)]
_DEEP = [("null", "[" * 5000 + "]" * 5000), ("1", "9" * 5000), *[("", "")] * 9]
_VALUES: list[Any] = [
    None, True, -1, 0, 3, 2**31, 10**400, 1e308, -1e-300, float("nan"), float("inf"), "", "\0", "\ud800", "x" * 5000,
    "../../x", "/etc/passwd", [], {}, [[]], [None], {"": None}, ["a", 1], "{{ 1/0 }}", "{% for", "{{ 'a'.format(1) }}",
]  # fmt: skip
"""What stands in place of a value of JSON."""


_CHECKPOINT = [
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
    "tokenizer.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json",
]  # fmt: skip
CASES: list[tuple[str, Sequence[str]]] = [
    *(("model.gguf", (verb,)) for verb in ("chat", "chat", "fit")),
    ("model.gguf", ("quantize", "{}", "-o", "out", "--type", "q8_0")),
    ("model.gguf", ("imatrix", "{}", "-o", "out")),
    *((f"checkpoint/{name}", ("convert", "checkpoint", "-o", "out")) for name in _CHECKPOINT),
    *((name, ("quantize", "model.gguf", "-o", "out", "--imatrix", "{}")) for name in ("matrix.gguf", "matrix.dat")),
    ("matrix.gguf", ("imatrix", "model.gguf", "-o", "out", "--in-file", "{}", "--chunks", "1")),
    ("adapter.gguf", ("chat", "{}")),
    ("settings.toml", ("serve", "--config", "{}", "--print-config")),
]  # fmt: skip
"""What becomes of a mutant: the file of the base folder that is changed, and the verb that is given it."""


def make_base(folder: Path) -> Path:
    """Write the sound files that mutants are made of, small ones, and return their folder."""
    checkpoint = write_checkpoint(folder / "checkpoint", layers=1)
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    model = convert_checkpoint(checkpoint, folder / "model.gguf", outtype="f32").path
    columns = {t.name: t.shape[0] for t in read_gguf(model).tensors if t.name.startswith("blk.") and len(t.shape) > 1}
    one = np.ones(1, np.float32)
    entries = {name: ImatrixEntry(np.ones((1, count), np.float32), one) for name, count in columns.items()}
    write_imatrix(folder / "matrix.gguf", Imatrix(entries, ["text"], 1, 512))
    older = [
        struct.pack("<i", len(n)) + n.encode() + struct.pack("<ii", 1, c) + bytes(4 * c) for n, c in columns.items()
    ]
    (folder / "matrix.dat").write_bytes(struct.pack("<i", len(older)) + b"".join(older) + struct.pack("<i", 1))
    factors = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
    write_adapter(folder / "adapter.gguf", {"blk.0.attn_output.weight": factors})
    (folder / "settings.toml").write_text('model = "demo"\nctx-size = 512\nlora = ["a.gguf=0.5"]\n')
    return folder


def mutate(path: Path, dice: random.Random) -> None:
    """Change a file: values when it is JSON or, sometimes, a GGUF; else its bytes, most often in front."""
    content = path.read_bytes()
    data, end = bytearray(content), min(len(content), 4096)
    if path.suffix == ".json" and dice.random() < 0.8:
        tree = json.loads(content)
        for _ in range(dice.choice([1, 1, 1, 3])):
            tree = _changed(tree, dice)
        path.write_text(json.dumps(tree).replace(*dice.choice(_DEEP), 1))
        return
    if path.suffix == ".gguf":
        header = read_gguf(path)
        end = header.data_start
        if dice.random() < 0.4:
            key = dice.choice([*header.types]).encode()
            at = content.index(key) + len(key) + 4 + dice.choice([0, 0, 0, -4, 4, 12])
            data[at : at + 4] = dice.choice([struct.pack("<Q", n)[:4] for n in _NUMBERS] + _FLOATS)
            path.write_bytes(data)
            return
    end = len(data) if dice.random() < 0.25 else end
    for _ in range(dice.choice([1, 1, 2, 8])):
        at, size = dice.randrange(max(1, min(end, len(data)))), dice.choice([1, 4, 8, 100])
        changes = {
            0: (at + 1, dice.randbytes(1)),
            1: (at + 4, struct.pack("<Q", dice.choice(_NUMBERS))[:4]),
            2: (at + 8, struct.pack("<Q", dice.choice(_NUMBERS))),
            3: (at + size, b""),
            4: (at, data[dice.randrange(end) :][:size]),
            5: (at + size, dice.randbytes(size)),
            6: (len(data) if dice.random() < 0.2 else at, b""),
        }
        stop, put = dice.choice(changes)
        data[at:stop] = put
    path.write_bytes(data)


def _changed(tree: Any, dice: random.Random) -> Any:
    """Return a value of JSON in which one place, as likely near the root as far from it, is another."""
    if isinstance(tree, dict | list) and tree and dice.random() < 0.8:
        key = dice.choice([*tree] if isinstance(tree, dict) else range(len(tree)))
        copy = tree.copy()
        if dice.random() < 0.1:
            del copy[key]
        else:
            copy[key] = _changed(copy[key], dice)
        return copy
    return dice.choice(_VALUES)


class _Fork:
    """Stands for `subprocess.Popen` of a worker: a fork of this process instead of a new interpreter."""

    def __init__(self, command: Sequence[str], *, stderr: Any, **_: object) -> None:
        (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for source, target in ((their_in, 0), (their_out, 1), (stderr.fileno(), 2)):
                os.dup2(source, target)
            os.closerange(3, 256)
            sys.stdin = open(0)  # noqa: SIM115
            _leave(lambda: runpy.run_module(command[-1], run_name="__main__", alter_sys=True))
        os.close(their_in)
        os.close(their_out)
        self.stdin, self.stdout = os.fdopen(our_out, "wb"), os.fdopen(our_in, "rb")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        with contextlib.suppress(ChildProcessError):
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def _leave(work: Callable[[], object]) -> NoReturn:
    code = 0
    try:
        work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - as the verbs' own guard does
        say = sentence_of(error) if isinstance(error, Exception) else repr(error)
        os.write(2, f"edge-phi3: {say}\n".encode(errors="replace"))
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def _chat(model: str, *adapter: str) -> None:
    settings = Settings(
        model=model, lora=tuple(Lora(Path(name)) for name in adapter), threads=1, ctx_size=64, prefix_cache=False
    )
    pipeline = load_pipeline(settings, lambda _: None)
    prepared = pipeline.prepare(
        messages=[{"role": "user", "content": "a\U0001f600"}], generate_kwargs={"max_new_tokens": 3}
    )
    asyncio.run(pipeline.generate(prepared))
    pipeline.engine.close()


def run(base: Path, seed: int, number: int) -> str:
    """Give a mutant to its verb; return what is wrong with how it went, the empty text if nothing is."""
    dice = random.Random(f"{seed}/{number}")
    file, arguments = dice.choice(CASES)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        folder = Path(temporary) / "folder"
        shutil.copytree(base, folder)
        mutate(folder / file, dice)
        before = {path.relative_to(temporary) for path in Path(temporary).rglob("*")}
        verb, *words = [argument.format(file) for argument in arguments]
        log = Path(temporary, "log")
        pid = os.fork()
        if pid == 0:
            os.chdir(folder)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.alarm(20 * _SECONDS)  # of waiting
            resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 5))
            subprocess.Popen = _Fork  # type: ignore[assignment, misc]
            if verb == "chat":
                _leave(lambda: _chat("model.gguf", *words))
            _leave(lambda: cli.app([verb, *words, *([file] if verb == "fit" else [])], prog_name="edge-phi3"))
        _, status, usage = os.wait4(pid, 0)
        code, said = os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        new = {path.relative_to(temporary) for path in Path(temporary).rglob("*")} - before
        new -= {Path("log"), *([Path("folder/out")] if code == 0 else [])}
        wrong = {
            f"it ended with {code}": code not in {0, 1, 2},
            "it shows a traceback": "Traceback" in said or "should not have happened" in said,
            "it does not say why": code != 0 and "edge-phi3: " not in said,
            f"it left {new}": bool(new),
            f"it took {usage.ru_maxrss >> 10} MiB": usage.ru_maxrss << 10 > _MEMORY + _START,
        }
        found = next((what for what, is_so in wrong.items() if is_so), "")
        return found and f"{seed}/{number}, {file} for {verb}: {found}: {said[-2000:]}"


_START = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        numbers, count = range(options.first, options.first + options.mutants), 0
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            tasks = [pool.apply_async(run, (base, options.seed, number)) for number in numbers]
            for failure in filter(None, (task.get() for task in tasks)):
                count += 1
                print(failure, flush=True)
    print(f"{options.mutants} mutants, {count} failed")
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
