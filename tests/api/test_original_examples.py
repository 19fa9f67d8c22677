"""The curl commands of the original service's document, as written there, host and port replaced."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.api.conftest import Running

CURL = """curl -X POST "http://<SERVICE>:80/chat" -H "accept: application/json" -H "Content-Type: application/json" """
ALL_PARAMETERS = """curl -X POST \\
    -H "accept: application/json" \\
    -H "Content-Type: application/json" \\
    -d '{
        "prompt":"YOUR_PROMPT_HERE", "return_full_text": false, "clean_up_tokenization_spaces": false,
        "prefix": null, "handle_long_generation": null,
        "generate_kwargs": {
                "max_length":200, "min_length":0, "do_sample":true, "early_stopping":false, "num_beams":1,
                "num_beam_groups":1, "diversity_penalty":0.0, "temperature":1.0, "top_k":10, "top_p":1, "typical_p":1,
                "repetition_penalty":1, "length_penalty":1, "no_repeat_ngram_size":0, "encoder_no_repeat_ngram_size":0,
                "bad_words_ids":null, "num_return_sequences":1, "output_scores":false, "return_dict_in_generate":false,
                "forced_bos_token_id":null, "forced_eos_token_id":null, "remove_invalid_values":null
            }
        }' \\
        "http://<SERVICE>:80/chat"
"""
TOURIST = (
    r"<|user|>\nI am going to Paris, what should I see?<|end|>\n<|assistant|>\nParis, the capital of France, is known "
    r"for its stunning architecture, art museums, historical landmarks, and romantic atmosphere.<|end|>\n<|user|>\n"
    r"What is so great about #1?<|end|>\n<|assistant|>\n"
)


@pytest.mark.parametrize(
    ("command", "echoed"),
    [
        (CURL + """-d '{"prompt":"YOUR_PROMPT_HERE"}'""", "YOUR_PROMPT_HERE"),
        (
            CURL + """-d '{"prompt":"<|user|> How to explain Internet?<|end|><|assistant|>"}'""",
            "<|user|> How to explain",
        ),
        (CURL + f"""-d '{{"prompt":"{TOURIST}"}}'""", "<|user|>\nI am going to Paris, what should I see?<|end|>\n"),
        (ALL_PARAMETERS, ""),
    ],
    ids=["basic", "chat template", "few-shot", "all parameters"],
)
def test_an_example_of_the_original_s_document_answers(api: Running, command: str, echoed: str) -> None:
    here = command.replace("<SERVICE>:80", f"127.0.0.1:{api.port}")
    shown_status = here.replace("curl ", "curl --silent --show-error --write-out '\\n%{http_code}' ", 1)
    result = subprocess.run(["bash", "-c", shown_status], capture_output=True, text=True, check=True)
    body, status = result.stdout.rsplit("\n", 1)
    assert status == "200"
    answer = json.loads(body)
    assert list(answer) == ["Result"]
    assert answer["Result"].startswith(echoed)
    assert len(answer["Result"]) > len(echoed)
