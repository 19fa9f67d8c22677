"""Options: defaults, precedence, sentences about wrong values, and the TOML that --print-config writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.settings import ENV_PREFIX, Settings, SettingsError
from edge_phi3.settings_text import to_toml


@pytest.fixture(autouse=True)
def _no_options_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


def test_flags_win_over_the_environment_which_wins_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text('port = 1001\nctx-size = 2001\nbatch_size = 33\nhost = "0.0.0.0"\n')
    monkeypatch.setenv("EDGE_PHI3_PORT", "1002")
    monkeypatch.setenv("EDGE_PHI3_CTX_SIZE", "2002")
    settings = Settings.load({"port": "1003"}, config)
    assert (settings.port, settings.ctx_size, settings.batch_size, settings.host) == (
        1003,
        2002,
        33,
        "0.0.0.0",
    )


def test_engine_options_have_the_engine_s_defaults() -> None:
    settings = Settings.load()
    for field in dataclasses.fields(EngineSettings):
        if field.name != "model_path":
            assert getattr(settings, field.name) == field.default, field.name


def test_printed_configuration_reads_back_as_the_same_options(tmp_path: Path) -> None:
    flags = {
        "port": 0,
        "lora": ["a b.gguf=0.5", "c.gguf"],
        "cors_origin": ["https://a.example", "https://b.example"],
        "max_body_size": "1MiB",
        "rate_limit": "5/second",
        "store": "models",
        "log_prompts": True,
        "metrics_prefix": "vllm:",
    }
    settings = Settings.load(flags)
    config = tmp_path / "config.toml"
    config.write_text(to_toml(settings))
    assert Settings.load(config_file=config) == settings
    for name in Settings.model_fields:
        assert name.replace("_", "-") + " =" in config.read_text()


def test_printed_configuration_never_shows_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_PHI3_API_KEY", "first-secret,second-secret")
    settings = Settings.load()
    assert settings.api_keys() == ["first-secret", "second-secret"]
    assert "secret" not in to_toml(settings)
    assert "secret" not in repr(settings)


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\n  two \n")
    assert Settings.load({"api_key": ["zero"], "api_key_file": str(keys)}).api_keys() == [
        "zero",
        "one",
        "two",
    ]


@pytest.mark.parametrize("content", [None, "\n \n", "ключ"])
def test_a_key_file_without_usable_keys_is_refused(tmp_path: Path, content: str | None) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match="--api-key-file"):
        Settings.load({"api_key_file": str(keys)})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("port", "99999", "--port: '99999' is not allowed; give a whole number from 0 to 65535."),
        ("port", "web", "--port: 'web' is not allowed; give a whole number from 0 to 65535."),
        ("parallel", 0, "--parallel: 0 is not allowed; give a whole number from 1 to 255."),
        ("kv_cache_type", "f8", "--kv-cache-type: 'f8' is not allowed; give one of f32, f16, q8_0."),
        ("grace_period", "-1", "--grace-period: '-1' is not allowed; give a number from 0 to 86400."),
        ("log_prompts", "perhaps", "--log-prompts: 'perhaps' is not allowed; give true or false."),
        ("lora", ["a.gguf=big"], "--lora: ['a.gguf=big'] is not allowed; give FILE[=SCALE]."),
        (
            "max_body_size",
            "12",
            "--max-body-size: '12' is not allowed; give a size such as 4MiB or 65536, from 1024 to 1073741824.",
        ),
    ],
)
def test_a_wrong_flag_is_one_sentence(name: str, value: object, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({name: value})
    assert str(caught.value) == sentence


def test_a_wrong_variable_and_a_wrong_key_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('rate-limit = "5/week"\n')
    with pytest.raises(SettingsError, match=r"^rate-limit in .*config\.toml: '5/week' is not allowed"):
        Settings.load(config_file=config)
    monkeypatch.setenv("EDGE_PHI3_THREADS", "many")
    with pytest.raises(SettingsError, match=r"^EDGE_PHI3_THREADS: 'many' is not allowed"):
        Settings.load()


def test_a_wrong_quantisation_type_names_close_ones() -> None:
    with pytest.raises(SettingsError, match=r"--quant: 'Q4_K_L' .*Q4_K_M"):
        Settings.load({"quant": "Q4_K_L"})
    assert Settings.load({"quant": "q8_0"}).quant == "Q8_0"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("prot = 1", "has the key 'prot', which is no option. Did you mean port?"),
        ("port = ", "is not valid TOML"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    config = tmp_path / "config.toml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(SettingsError) as caught:
        Settings.load(config_file=config)
    assert sentence in str(caught.value)


def test_a_key_is_not_repeated_in_a_message() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({"api_key": ["geheim-ü"]})
    assert "geheim" not in str(caught.value)


def test_the_address_that_kubernetes_puts_in_the_port_variable_is_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGE_PHI3_PORT", "tcp://10.0.0.1:80")
    assert Settings.load().port == 8080
