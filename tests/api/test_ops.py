"""Health, readiness, versions, tokens, and both faces of ``/metrics``."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from edge_phi3 import __version__
from edge_phi3.api.service import Say
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.system_resources import gpus
from tests.api.conftest import GREEDY, PATIENCE, PROMPT, Running, loader, ready, running

PROMETHEUS = {"accept": "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}


@pytest.fixture
def loading(model_path: Path) -> Iterator[tuple[Running, threading.Event]]:
    """A service whose model loads when the event is set."""
    go = threading.Event()

    def load(say: Say) -> TextGenerationPipeline:
        say("Downloading the model: 34 %.")
        assert go.wait(PATIENCE)
        return loader(model_path)(say)

    with running(load) as it:
        yield it, go
        go.set()


def test_the_service_answers_while_its_model_loads(loading: tuple[Running, threading.Event]) -> None:
    api, go = loading
    statuses = {"/": 200, "/healthz": 500, "/livez": 200, "/readyz": 503, "/version": 200, "/metrics/prometheus": 200}
    answers = {path: api.client.get(path) for path in statuses}
    assert {path: answer.status_code for path, answer in answers.items()} == statuses
    progress = {"detail": "Downloading the model: 34 %."}
    assert answers["/healthz"].json() == answers["/readyz"].json() == progress
    assert answers["/version"].json()["model"] is None
    refused = api.chat(prompt="a")
    assert (refused.status_code, refused.json()) == (503, progress)
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
        for path, status in (("/healthz", 500), ("/livez", 500), ("/readyz", 503)):
            response = api.client.get(path)
            assert (response.status_code, response.json()) == (status, {"detail": engine.status_detail})
        assert api.client.get("/").status_code == 200


def test_the_version_names_the_model(api: Running) -> None:
    body = api.client.get("/version").json()
    assert body["version"] == __version__
    assert body["model"]["name"] == "random-4k"
    assert body["model"]["context_length"] == 4096


def test_what_is_not_there_is_said_so(api: Running) -> None:
    response = api.client.get("/nowhere")
    assert response.status_code == 404
    assert response.json() == {"detail": "There is nothing at /nowhere; /docs shows what there is."}
    response = api.client.get("/chat")
    assert response.status_code == 405
    assert response.json() == {"detail": "GET is not a method of /chat."}


def test_text_goes_to_tokens_and_back(api: Running) -> None:
    tokens = api.client.post("/tokenize", json={"text": PROMPT}).json()["tokens"]
    body = api.chat(prompt=PROMPT, generate_kwargs={**GREEDY, "return_dict_in_generate": True}).json()
    assert body["sequences"][0][: len(tokens)] == tokens
    plain = api.client.post("/tokenize", json={"text": "<|user|>", "parse_special_tokens": False}).json()["tokens"]
    assert len(plain) > 1
    for skip in (False, True):
        body = {"tokens": tokens, "skip_special_tokens": skip}
        text = api.client.post("/detokenize", json=body).json()["text"]
        assert "json.dumps" in text
        assert ("<|user|>" in text) is not skip


@pytest.mark.parametrize("token", [-1, 10**6, 2**70])
def test_a_token_that_does_not_exist_is_refused(api: Running, token: int) -> None:
    response = api.client.post("/detokenize", json={"tokens": [1, token]})
    assert response.status_code == 400
    assert "tokens[1]" in response.json()["detail"]


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
    answers = {
        "Init": lambda: None,
        "Shutdown": lambda: None,
        "DeviceGetCount": lambda: 2,
        "DeviceGetHandleByIndex": lambda index: index,
        "DeviceGetName": lambda index: ["GeForce GTX 950", b"A100 MIG"][index],
        "DeviceGetMemoryInfo": lambda _: pynvml.c_nvmlMemory_t(total=2 * gib, free=gib, used=gib),
        "DeviceGetTemperature": lambda _index, _sensor: 55,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", answer)

    def utilization(index: int) -> pynvml.c_nvmlUtilization_t:
        if index == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return pynvml.c_nvmlUtilization_t(gpu=25)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", utilization)
    memory = {"used": "1.00 GB", "total": "2.00 GB"}
    assert api.client.get("/metrics").json() == {
        "gpu_info": [
            {"id": "0", "name": "GeForce GTX 950", "load": "25.00%", "temperature": "55 C", "memory": memory},
            {"id": "1", "name": "A100 MIG", "load": "n/a", "temperature": "55 C", "memory": memory},
        ],
        "cpu_info": None,
    }


def samples(api: Running) -> dict[str, float]:
    """Scrape, and give each sample's value by name and labels."""
    text = api.client.get("/metrics", headers={"accept": "text/plain"}).text
    found = {}
    for family in parse_text(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_prometheus_gets_its_own_formats(api: Running) -> None:
    response = api.client.get("/metrics", headers=PROMETHEUS)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(response.text)}
    assert {"edge_phi3_num_requests_waiting", "edge_phi3_kv_cache_usage_perc", "edge_phi3_requests"} <= names
    response = api.client.get("/metrics/prometheus")
    assert response.headers["content-type"].startswith("text/plain")
    assert list(parse_text(response.text))


def test_requests_are_counted(api: Running) -> None:
    model = "model_name=random-4k"
    before = samples(api)
    api.chat(prompt=PROMPT, generate_kwargs={**GREEDY, "eos_token_id": -1})
    api.chat(prompt="a", generate_kwargs={"top_p": 7})
    after = samples(api)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("edge_phi3_requests_total{endpoint=/chat,outcome=ok}") == 1
    assert grown("edge_phi3_requests_total{endpoint=/chat,outcome=invalid}") == 1
    assert grown(f"edge_phi3_generation_tokens_total{{{model}}}") == 8
    assert grown(f"edge_phi3_request_success_total{{finished_reason=length,{model}}}") == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "time_per_output_token_seconds"):
        assert grown(f"edge_phi3_{name}_count{{{model}}}") == 1
    assert after[f"edge_phi3_kv_cache_cells_total{{{model}}}"] == 2048
    api.wait_until(lambda: samples(api)[f"edge_phi3_num_requests_running{{{model}}}"] == 0)


def test_what_has_finished_moves_from_the_cells_to_the_prefix_cache(api: Running) -> None:
    def value(name: str) -> float:
        return samples(api)[f"edge_phi3_{name}{{model_name=random-4k}}"]

    kept = value("prefix_cache_tokens")
    api.chat(prompt="Nobody has asked this before.", generate_kwargs={**GREEDY, "eos_token_id": -1})
    api.wait_until(lambda: value("kv_cache_usage_perc") == 0)
    assert value("prefix_cache_tokens") > kept
    assert value("prefix_cache_bytes") > 0


def test_metrics_take_the_names_of_vllm_s_dashboards(model_path: Path) -> None:
    with ready(loader(model_path), metrics_prefix="vllm:") as api:
        api.chat(prompt="a", generate_kwargs=GREEDY)
        names = {name.partition("{")[0] for name in samples(api)}
    gauges = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
    counters = {"prompt_tokens_total", "generation_tokens_total", "request_success_total"}
    histograms = {"time_to_first_token_seconds_bucket", "e2e_request_latency_seconds_bucket"}
    assert {f"vllm:{name}" for name in gauges | counters | histograms} <= names
