"""Who is let in; health, readiness, versions, tokens, long texts, and both faces of ``/metrics``."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pynvml
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from edge_phi3 import __version__
from edge_phi3.api.service import Say
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.system_resources import gpus
from tests.api.conftest import GREEDY, PATIENCE, PROMPT, Running, loader, ready
from tests.support.cases import cases, tables

BODY = {"prompt": "a", "generate_kwargs": GREEDY}
SECRET = "correct-horse"
PROMETHEUS = {"accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}


def test_the_service_answers_while_its_model_loads(model_path: Path) -> None:
    go, progress = threading.Event(), {"detail": "Downloading the model: 34 %."}

    def load(say: Say) -> TextGenerationPipeline:
        say(progress["detail"])
        assert go.wait(PATIENCE)
        return loader(model_path)(say)

    with ready(load, wait=False) as api:
        try:
            for path, status in {"/": 200, "/livez": 200, "/version": 200, "/metrics/prometheus": 200}.items():
                assert api.client.get(path).status_code == status
            assert api.client.get("/version").json()["model"] is None
            for path, status in {"/healthz": 500, "/health": 500, "/readyz": 503}.items():
                answer = api.client.get(path)
                assert (answer.status_code, answer.json()) == (status, progress)
            refused = api.chat(prompt="a")
            assert (refused.status_code, refused.json()) == (503, progress)
        finally:
            go.set()
        api.wait_until(lambda: api.client.get("/readyz").status_code == 200)
        assert api.client.get("/").json() == {"message": "Server is running"}
        assert api.client.get("/healthz").json() == {"status": "Healthy"}
        assert api.client.get("/readyz").json() == {"status": "Ready"}
        assert api.chat(prompt="a", generate_kwargs=GREEDY).status_code == 200


def test_a_broken_engine_is_unhealthy_and_not_alive(model_path: Path) -> None:
    with ready(loader(model_path)) as api:
        engine = api.service.pipeline.engine
        engine.status, engine.status_detail = "broken", "The engine is broken: out of cells."
        for path, status in (("/healthz", 500), ("/health", 500), ("/livez", 500), ("/readyz", 503)):
            response = api.client.get(path)
            assert (response.status_code, response.json()) == (status, {"detail": engine.status_detail})
        assert api.client.get("/").status_code == 200


def test_the_version_names_the_model_and_what_is_not_there_is_said_so(api: Running) -> None:
    body = api.client.get("/version").json()
    assert (body["version"], body["model"]["name"]) == (__version__, "random-4k")
    assert body["model"]["context_length"] == 4096
    for path, status, sentence in tables(__file__)["NOT_THERE"]:
        response = api.client.get(path)
        code = {404: "unknown_url", 405: "method_not_supported"}[status]
        error = {"message": sentence, "type": "invalid_request_error", "param": None, "code": code}
        body = {"error": error} if path.startswith("/v1") else {"detail": sentence}
        assert (response.status_code, response.json()) == (status, body)
        assert ("POST" in response.headers.get("allow", "")) is (status == 405)


def test_what_get_answers_head_answers_without_its_body(api: Running) -> None:
    for path in gets(api):
        asked, headed = api.client.get(path, follow_redirects=False), api.client.head(path)
        assert (headed.status_code, headed.content) == (asked.status_code, b""), path
        assert headed.headers["content-type"] == asked.headers["content-type"]
        assert path.startswith("/metrics") or headed.headers["content-length"] == asked.headers["content-length"]
    refused = api.client.head("/chat")
    assert (refused.status_code, refused.content) == (405, b"")
    assert "HEAD" in api.client.post("/livez").headers["allow"]


def gets(api: Running) -> list[str]:
    """Return every route of GET, as it is or with what it needs in its path."""
    app = api.app.app
    assert isinstance(app, Litestar)
    paths = {route.path for route in app.routes if isinstance(route, HTTPRoute) and "GET" in route.methods}
    names = {"/docs/{name:str}": "/docs/index.html", "/ui/{name:str}": "/ui/index.html"}
    return sorted(names.get(path, path).replace("{name:path}", "random-4k") for path in paths)


def test_text_goes_to_tokens_and_back_and_what_is_no_token_is_refused(api: Running) -> None:
    tokens = api.tokenize(text=PROMPT)["tokens"]
    body = api.chat(prompt=PROMPT, generate_kwargs={**GREEDY, "return_dict_in_generate": True}).json()
    assert body["sequences"][0][: len(tokens)] == tokens
    plain = api.tokenize(text="<|user|>", parse_special_tokens=False)["tokens"]
    assert len(plain) > 1
    for skip in (False, True):
        body = {"tokens": tokens, "skip_special_tokens": skip}
        text = api.client.post("/detokenize", json=body).json()["text"]
        assert "json.dumps" in text
        assert ("<|user|>" in text) is not skip
    for token in (-1, 10**6, 2**70):
        response = api.client.post("/detokenize", json={"tokens": [1, token]})
        assert response.status_code == 400
        assert "tokens[1]" in response.json()["detail"]


LONG = "a long story " * 4000


@cases
def test_others_are_answered_while_a_long_text_is_turned_into_tokens_or_back(
    api: Running, monkeypatch: pytest.MonkeyPatch, path: str, method: str, body: dict[str, Any]
) -> None:
    body = json.loads(json.dumps(body).replace("LONG", LONG).replace('"IDS"', str([300] * len(LONG))))
    owner = TextGenerationPipeline if method == "prepare" else Tokenizer
    works = getattr(owner, method)
    begun, answered = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert answered.wait(PATIENCE)
        return works(*args, **kwargs)

    monkeypatch.setattr(owner, method, slow)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(api.client.post, path, json=body)
        assert begun.wait(PATIENCE)
        assert api.client.get("/healthz").status_code == 200
        answered.set()
        assert long.result().status_code in {200, 400}


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html,application/xhtml+xml,*/*;q=0.8"])
def test_metrics_describe_the_cpus_of_a_machine_without_a_gpu(api: Running, accept: str) -> None:
    if gpus():
        pytest.skip("this machine has a GPU")
    body = api.client.get("/metrics", headers={"accept": accept}).json()
    assert body["gpu_info"] is None
    cpu = body["cpu_info"]
    assert set(cpu) == {"load_percentage", "physical_cores", "total_cores", "memory"}
    assert 0 <= cpu["load_percentage"] <= 100
    assert 1 <= cpu["physical_cores"] <= cpu["total_cores"]
    for value in (cpu["memory"]["used"], cpu["memory"]["total"]):
        assert re.fullmatch(r"\d+\.\d\d GB", value)


def test_metrics_describe_the_gpus(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1024**3

    def unsupported(*_: object) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers: dict[str, Any] = {
        "Init": lambda: None,
        "Shutdown": lambda: None,
        "DeviceGetCount": lambda: 2,
        "DeviceGetHandleByIndex": lambda index: index,
        "DeviceGetName": lambda index: ["GeForce GTX 950", b"A100 MIG"][index],
        "DeviceGetMemoryInfo": lambda _: pynvml.c_nvmlMemory_t(total=2 * gib, free=gib, used=gib),
        "DeviceGetTemperature": lambda _index, _sensor: 55,
        "DeviceGetUtilizationRates": lambda index: unsupported() if index else pynvml.c_nvmlUtilization_t(gpu=25),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", answer)
    assert api.client.get("/metrics").json() == tables(__file__)["GPUS"]
    # One that shares the machine's memory is shown with it.
    for name in ("DeviceGetMemoryInfo", "DeviceGetUtilizationRates", "DeviceGetTemperature"):
        monkeypatch.setattr(pynvml, f"nvml{name}", unsupported)
    gpu = api.client.get("/metrics").json()["gpu_info"][0]
    assert (gpu["name"], gpu["load"], gpu["temperature"]) == ("GeForce GTX 950", "n/a", "n/a")
    assert gpu["memory"]["total"].endswith(" GB")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", unsupported)
    assert api.client.get("/metrics").json()["cpu_info"] is not None


def samples(api: Running) -> dict[str, float]:
    """Scrape, and return each sample's value by its name and the values of its labels."""
    text = api.client.get("/metrics", headers={"accept": "text/plain"}).text
    found = [sample for family in parse_text(text) for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in found}


def test_prometheus_gets_its_own_formats_under_the_names_of_vllm_s_dashboards(model_path: Path) -> None:
    names = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "requests"}
    names |= {"generation_tokens", "request_success", "time_to_first_token_seconds", "e2e_request_latency_seconds"}
    with ready(loader(model_path), metrics_prefix="vllm:") as api:
        api.chat(prompt="a", generate_kwargs=GREEDY)
        answer = api.client.get("/metrics", headers=PROMETHEUS)
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert {f"vllm:{name}" for name in names} <= {family.name for family in parse_openmetrics(answer.text)}
        plain = api.client.get("/metrics/prometheus")
        assert plain.headers["content-type"].startswith("text/plain")
        assert (plain.headers["content-type"] + answer.headers["content-type"]).count("charset") == 2
        assert {f"vllm:{name}" for name in names} <= {family.name for family in parse_text(plain.text)}


def test_requests_are_counted_and_what_has_finished_moves_to_the_prefix_cache(api: Running) -> None:
    before = samples(api)
    api.chat(prompt="Nobody has asked this before.", generate_kwargs={**GREEDY, "eos_token_id": -1})
    api.chat(prompt="a", generate_kwargs={"top_p": 7})
    after = samples(api)
    expected: dict[str, int] = tables(__file__)["GROWN"]
    grown = {name: after[f"edge_phi3_{name}"] - before.get(f"edge_phi3_{name}", 0.0) for name in expected}
    assert grown == expected
    assert after["edge_phi3_kv_cache_cells random-4k"] == 2048
    assert (after["edge_phi3_model_layers gpu"], after["edge_phi3_model_layers cpu"]) == (0, 3)
    kept = "edge_phi3_prefix_cache_tokens random-4k"
    times = "edge_phi3_engine_step_{}_seconds_{} random-4k"
    steps = after["edge_phi3_engine_steps_total random-4k"]
    # The last thing that a step does.
    api.wait_until(lambda: samples(api)[times.format("host", "count")] == steps)
    after = samples(api)
    assert after[kept] > before[kept]
    assert after["edge_phi3_prefix_cache_bytes random-4k"] > 0
    assert after["edge_phi3_num_requests_running random-4k"] == after["edge_phi3_kv_cache_usage_perc random-4k"] == 0
    assert after[times.format("device", "count")] == steps
    assert after["edge_phi3_engine_step_device_seconds_bucket +Inf random-4k"] == steps
    assert after[times.format("device", "sum")] > 0


def test_metrics_have_names_and_texts_as_promtool_wants_them(api: Running) -> None:
    """The rules of ``promtool check metrics`` that names can break."""
    api.chat(prompt="a", generate_kwargs=GREEDY)
    families = [*parse_text(api.client.get("/metrics/prometheus").text)]
    assert len(families) > 30
    for family in families:
        assert family.documentation, family.name
        names = {sample.name for sample in family.samples}
        assert all(name.endswith("_total") for name in names) if family.type == "counter" else True, family.name
        if family.type == "gauge" and not family.name.endswith("_created"):  # the client library's, of every counter
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket")), family.name
        words = set(family.name.split("_"))
        assert not words & {"gauge", "counter", "histogram", "summary", "ms", "milliseconds", "kb", "mib", "minutes"}


@pytest.fixture(scope="module")
def guarded(model_path: Path) -> Iterator[Running]:
    with ready(loader(model_path), api_key=["first", SECRET]) as it:
        yield it


@cases
def test_known_keys_are_let_in_and_no_others(guarded: Running, name: str, value: str, status: int) -> None:
    headers = {name.encode(): value.encode("latin-1")}
    assert guarded.client.post("/chat", json=BODY, headers=headers).status_code == status
    for path in ("/chat", "/tokenize", "/detokenize"):
        response = guarded.client.post(path, content=b"not even JSON", headers=headers)
        assert response.status_code == (400 if status == 200 else 401)
        assert response.headers.get("www-authenticate") == (None if status == 200 else "Bearer")
        assert ("API key" in response.json()["detail"]) is (status == 401)


def test_probes_and_scrapers_need_no_key_nor_does_a_service_without_any(guarded: Running, api: Running) -> None:
    for path in ("/", "/healthz", "/livez", "/readyz", "/version", "/metrics", "/metrics/prometheus", "/docs"):
        assert guarded.client.get(path).status_code == 200
    assert api.client.post("/chat", json=BODY, headers={"authorization": "Bearer anything"}).status_code == 200
