"""The weights: a small Phi-3 trained from scratch to recite the corpus."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaTokenizerFast, Phi3Config, Phi3ForCausalLM

from .checkpoint import CONFIG, END, ENDOFTEXT, prompt_for
from .corpus import Item, Split, dice

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training run is made of: by default as the bundled one, whose card tells how its schedule differed."""

    seed: int = 3
    steps: int = 2400
    cooldown: int = 1400
    batch: int = 32
    peak_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    emphasis: int = 3
    two_turns: float = 0.1
    held_out_share: float = 0.05
    evaluate_every: int = 250
    threads: int = 2


@dataclass(slots=True)
class Run:
    """A trained model and how it got there; a point of `curve` is (step, loss of trained items, of held-out items)."""

    model: Phi3ForCausalLM
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def encode_turn(tokenizer: LlamaTokenizerFast, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of one turn of a conversation, and its labels: the answer and its ``<|end|>``, nothing else."""
    prompt = tokenizer(prompt_for(question)).input_ids
    reply = [*tokenizer(answer).input_ids, END]
    return prompt + reply, [_IGNORED] * len(prompt) + reply


def collate(samples: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Pad samples on the right to two (samples, positions) int64 arrays: ids and labels, labels one position ahead."""
    width = max(len(ids) for ids, _ in samples)
    ids = torch.full((len(samples), width), ENDOFTEXT)
    labels = torch.full((len(samples), width), _IGNORED)
    for row, (sample, target) in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
        labels[row, : len(target) - 1] = torch.tensor(target[1:])
    return ids, labels


def answer_logits(model: Phi3ForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (answer tokens, rows) at the positions that have a label, and those labels.

    Right-padded rows need no attention mask: causal attention never looks at what comes after.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = labels != _IGNORED
    return model.lm_head(hidden[wanted]), labels[wanted]


@torch.no_grad()
def evaluate(model: Phi3ForCausalLM, tokenizer: LlamaTokenizerFast, items: Sequence[Item]) -> tuple[float, list[bool]]:
    """Ask "What does NAME do?" about each item.

    Return the mean cross-entropy per answer token in nats, and for each item whether the greedy answer is exactly the
    expected one (each token of it is the most likely one after those before it, which is the same).
    """
    total, count = 0.0, 0
    exact: list[bool] = []
    for start in range(0, len(items), 64):
        turns = [encode_turn(tokenizer, f"What does {i.name} do?", i.answer) for i in items[start : start + 64]]
        ids, labels = collate(turns)
        logits, targets = answer_logits(model, ids, labels)
        total += functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        count += len(targets)
        wrong = torch.zeros(labels.shape, dtype=torch.bool)
        wrong[labels != _IGNORED] = logits.argmax(-1) != targets
        exact += (~wrong.any(1)).tolist()
    return total / count, exact


def _batches(split: Split, tokenizer: LlamaTokenizerFast, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches without end. Each pass shows an ordinary item once and an emphasised one `plan.emphasis` times.

    Samples of similar length share a batch, so that little of it is padding.
    """
    for epoch in itertools.count():
        chance = dice(f"{plan.seed}/{epoch}")
        order = [item for item in split.trained for _ in range(plan.emphasis if item.emphasised else 1)]
        chance.shuffle(order)
        samples = []
        for item in order:
            sample = encode_turn(tokenizer, item.ask(chance), item.answer)
            if chance.random() < plan.two_turns:
                before = chance.choice(split.trained)
                ids, labels = encode_turn(tokenizer, before.ask(chance), before.answer)
                sample = ids + sample[0], labels + sample[1]
            samples.append(sample)
        pool = plan.batch * 32
        batches = []
        for start in range(0, len(samples), pool):
            part = sorted(samples[start : start + pool], key=lambda sample: len(sample[0]))
            batches += [part[first : first + plan.batch] for first in range(0, len(part), plan.batch)]
        chance.shuffle(batches)
        yield from map(collate, batches)


def train(split: Split, tokenizer: LlamaTokenizerFast, plan: Plan) -> Run:
    """Train from scratch: AdamW, a trapezoid of learning rates; products in bfloat16, master weights in float32.

    Return the model with float32 weights rounded to bfloat16, which are the ones that are saved, and the loss curves.
    """
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    run = Run(Phi3ForCausalLM(Phi3Config(**CONFIG, torch_dtype="bfloat16")).float())
    matrices = [p for p in run.model.parameters() if p.dim() > 1]
    vectors = [p for p in run.model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.98), fused=True)
    probe = dice(plan.seed).sample(split.trained, len(split.held_out))

    for step, (ids, labels) in zip(range(plan.steps), _batches(split, tokenizer, plan), strict=False):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = plan.peak_rate * min((step + 1) / plan.warmup, 1.0, (plan.steps - step) / plan.cooldown)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, targets = answer_logits(run.model, ids, labels)
        loss = functional.cross_entropy(logits.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimizer.step()
        run.seconds += time.perf_counter() - began
        run.tokens += ids.numel()
        if (step + 1) % plan.evaluate_every == 0 or step + 1 == plan.steps:
            seen, unseen = (evaluate(run.model, tokenizer, items)[0] for items in (probe, split.held_out))
            run.curve.append((step + 1, seen, unseen))
            print(f"step {step + 1}: trained {seen:.3f}, held out {unseen:.3f} nats/token", file=sys.stderr)
    for weight in run.model.parameters():
        weight.data = weight.data.bfloat16().float()
    return run
