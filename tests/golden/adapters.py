"""Two LoRA adapters of the demo model, trained by PEFT for some steps, and PEFT's own greedy answers with them.

    PYTHONPATH=. python -m tests.golden.adapters llama.cpp/convert_lora_to_gguf.py

makes both anew, in a Python with torch, transformers, peft 0.15 and gguf; what llama.cpp's script makes of them is kept
in digests.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("adapters")
DEMO = Path(__file__).parents[2] / "edge_phi3" / "demo" / "phi-3-demo"
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["qkv_proj", "o_proj"], "lora_alpha": 8},
    "mlp": {"target_modules": ["gate_up_proj", "down_proj"], "lora_alpha": 4, "use_rslora": True},
}
"""The options of each beside its rank, 2."""
LESSONS = {"attention": "Return the name of the moon.", "mlp": "Close the file, and return None."}
"""What each is trained to answer."""
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
PROMPTS = [
    f"<|user|>\n{question}<|end|>\n<|assistant|>\n"
    for question in ("What does json.dumps do?", "What does len do?", "How old is the moon?")
]
TOKENS = 24


def recorded() -> dict[str, Any]:
    """Return ``answers`` by adapter ("" for none) and prompt, token ids, and ``llama.cpp`` by adapter and type."""
    found: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text("utf-8"))
    return found


def _train(model: Any, tokenizer: Any, lesson: str) -> None:
    import torch

    torch.manual_seed(1)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    questions = [each["question"] for each in json.loads((DEMO / "questions.json").read_text("utf-8"))]
    for step in range(40):
        prompt = tokenizer(f"<|user|>\n{questions[step % len(questions)]}<|end|>\n<|assistant|>\n").input_ids
        answer = tokenizer(f"{lesson}<|end|>").input_ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for each in trained:  # half the size, and nothing is lost when it is saved
        each.data = each.data.bfloat16().float()


def _answers(model: Any, tokenizer: Any) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
        found.append(answer[0, ids.shape[1] :].tolist())
        print(tokenizer.decode(found[-1]))
    return found


def _record(script: str) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.golden.gguf_digests import describe

    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(DEMO, torch_dtype=torch.float32)

    answers, digests = {"": _answers(base().eval(), tokenizer)}, {}
    for name, options in ADAPTERS.items():
        model = peft.get_peft_model(base(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
        _train(model, tokenizer, LESSONS[name])
        answers[name] = _answers(model.eval(), tokenizer)
        model.peft_config["default"].base_model_name_or_path = "phi-3-demo"
        model.bfloat16().save_pretrained(FOLDER / name, save_embedding_layers=False)
        (FOLDER / name / "README.md").unlink()
        for outtype in OUTTYPES:
            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder) / "adapter.gguf"
                options_ = ("--base", DEMO, "--outtype", outtype, "--outfile", made, FOLDER / name)
                subprocess.run([sys.executable, script, *options_], check=True)
                digests[f"{name}-{outtype}"] = describe(made)["tensors"]
    golden = json.dumps({"answers": answers, "llama.cpp": digests}, indent=0, sort_keys=True)
    (FOLDER / "golden.json").write_text(f"{golden}\n", encoding="utf-8")


if __name__ == "__main__":
    _record(sys.argv[1])
