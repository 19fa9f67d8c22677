"""Adapters over HTTP: listed, chosen by `model` and by `adapters`."""

from collections.abc import Iterator

import openai
import pytest

from edge_phi3.commands.loading import load_pipeline
from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.settings import Settings, SettingsError
from tests.api.conftest import PROMPT, USER, Running, ready
from tests.golden import adapters

GOLDEN = adapters.recorded()["answers"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("adapters")
    model = convert(DEMO_CHECKPOINT, folder / "phi-3-demo.gguf", outtype="f32").path
    files = {name: convert(adapters.FOLDER / name, folder / f"a={name}.gguf").path for name in adapters.ADAPTERS}
    lora = [f"{name}={path}" for name, path in files.items()] + [f"faint={files['mlp']}:1e-9"]
    return {"model": str(model), "lora": lora, "kv_cache_type": "f32", "threads": 1, "ctx_size": 2048}


@pytest.fixture(scope="module")
def api(options: dict[str, object]) -> Iterator[Running]:
    settings = Settings.load(options)
    with ready(lambda say: load_pipeline(settings, say)) as it:
        yield it


def chat(api: Running, prompt: int, **body: object) -> str:
    wanted = {"do_sample": False, "max_new_tokens": adapters.TOKENS, "return_dict_in_generate": True}
    answer = api.chat(prompt=adapters.PROMPTS[prompt], generate_kwargs=wanted, **body).json()
    tokens = answer["sequences"][0][answer["usage"]["prompt_tokens"] :]
    return str(tokens)


def test_what_is_served_is_listed(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["phi-3-demo", "attention", "mlp", "faint"]
    assert [model.to_dict().get("parent") for model in listed] == [None, *["phi-3-demo"] * 3]
    assert client.models.retrieve("mlp") == listed[2]


def test_the_model_field_chooses_and_the_answer_names_what_answered(api: Running, client: openai.OpenAI) -> None:
    for name, golden in (("phi-3-demo", ""), ("attention", "attention"), ("mlp", "mlp")):
        expected = api.service.pipeline.tokenizer.decode(GOLDEN[golden][0], skip_special_tokens=True)
        whole = client.completions.create(model=name, prompt=adapters.PROMPTS[0], temperature=0, max_tokens=24)
        with client.chat.completions.create(model=name, messages=USER, temperature=0, stream=True) as stream:
            chunks = list(stream)
        assert {whole.model, *(chunk.model for chunk in chunks)} == {name}
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert [whole.choices[0].text.strip(), streamed.strip()] == [expected] * 2


def test_an_unknown_model_is_told_what_there_is(api: Running, client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.completions.create(model="gpt-4o", prompt=PROMPT),
        lambda: client.chat.completions.create(model="gpt-4o", messages=USER),
        lambda: client.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError, match="'gpt-4o' here; there is phi-3-demo, attention, mlp, fai") as it:
            ask()
        assert it.value.code == "model_not_found"
    assert api.client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}).json()["model"] == "phi-3-demo"


def test_adapters_chooses_on_chat(api: Running) -> None:
    given: tuple[tuple[object, str], ...] = ((None, ""), ([], ""), ("mlp", "mlp"), (["mlp"], "mlp"))
    for names, answering in given:
        assert chat(api, 0, adapters=names) == str(GOLDEN[answering][0])
    for wrong in ("absent", ["mlp", "attention"], "phi-3-demo"):
        refused = api.chat(prompt=PROMPT, adapters=wrong)
        sentence = "`adapters` may name one" if len(wrong) == 2 else "`adapters` must be one of attention, mlp, faint."
        assert (refused.status_code, sentence in refused.text) == (400, True)


def test_an_adapter_is_not_called_as_the_model(options: dict[str, object]) -> None:
    settings = Settings.load(options | {"lora": ["phi-3-demo=a.gguf"]})
    with pytest.raises(SettingsError, match="--lora: phi-3-demo is the model's own name"):
        load_pipeline(settings, lambda _: None)
