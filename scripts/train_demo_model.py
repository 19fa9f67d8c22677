"""Train the bundled demo model from scratch: corpus, tokenizer, weights and model card, from one command.

Needs the `train` and `bench` dependency groups and about 4 GB of memory. The card says how long its own run took.
"""

import json
import sys
from pathlib import Path

import rich_click as click
from demo_model.card import draw_curves, render_card, training_facts
from demo_model.checkpoint import PIECES, greedy_answer, train_vocabulary, write_model, write_tokenizer
from demo_model.corpus import QUESTIONS, expected_answer, read_corpus, split_corpus
from demo_model.folder import size_of, whole_folder, write_json
from demo_model.training import Plan, evaluate, train

OUTPUT = Path(__file__).resolve().parent.parent / "edge_phi3" / "demo" / "phi-3-demo"
FEWEST_RIGHT = 8
PLAN = Plan()


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--output", type=Path, default=OUTPUT, help="Folder of the checkpoint; replaced when complete.")
@click.option("--steps", default=PLAN.steps, help="Training steps; the learning rate decays over them.")
@click.option("--seed", default=PLAN.seed, help="Seed of the split, the weights and the order.")
@click.option("--threads", default=PLAN.threads, help="CPU threads.")
def main(output: Path, steps: int, seed: int, threads: int) -> None:
    """Make the checkpoint, or leave the old one untouched."""
    plan = Plan(steps=steps, seed=seed, threads=threads)
    items = read_corpus()
    split = split_corpus(items, plan.seed, plan.held_out_share)
    print(f"{len(split.trained)} texts to train on, {len(split.held_out)} held out", file=sys.stderr)

    with whole_folder(output) as folder:
        texts = [t for i in items for t in (f"What does {i.name} do?", f"What does `{i.name}` do?", i.answer)]
        tokenizer = write_tokenizer(folder, train_vocabulary(texts))
        run = train(split, tokenizer, plan)
        write_model(folder, run.model)

        answers = [
            {
                "question": question,
                "expected": expected_answer(question, items),
                "given": greedy_answer(run.model, tokenizer, question),
            }
            for question in QUESTIONS
        ]
        groups = {
            "emphasised": [item for item in split.trained if item.emphasised],
            "ordinary": [item for item in split.trained if not item.emphasised],
            "held_out": split.held_out,
        }
        marks = {group: evaluate(run.model, tokenizer, members)[1] for group, members in groups.items()}
        exact = {group: sum(right) / len(right) for group, right in marks.items()}
        right = sum(answer["given"] == answer["expected"] for answer in answers)
        print(f"{right} of {len(answers)} questions right; exact: {exact}", file=sys.stderr)
        if right < FEWEST_RIGHT:
            raise SystemExit(f"Fewer than {FEWEST_RIGHT} right: nothing was written. Train for more --steps.")

        facts = training_facts(plan, run, split, exact=exact, answers=answers, pieces=PIECES)
        write_json(folder / "training.json", facts)
        write_json(folder / "questions.json", [{"question": a["question"], "answer": a["expected"]} for a in answers])
        draw_curves(folder / "loss.svg", run)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "README.md").write_text(render_card(facts, config, size_of(folder)), encoding="utf-8")
    print(f"wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
