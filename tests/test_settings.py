"""Options: defaults, precedence, and sentences about wrong values. What --print-config writes, `test_cli` reads."""

import dataclasses
from pathlib import Path

import pytest

from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.settings import ENV_PREFIX, Settings, SettingsError, digest_of, to_toml
from tests.support.cases import cases


@pytest.fixture(autouse=True)
def _no_options_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('port = 1001\nctx-size = 2001\nbatch_size = 33\nhost = "0.0.0.0"\n')
    monkeypatch.setenv("EDGE_PHI3_PORT", "1002")
    monkeypatch.setenv("EDGE_PHI3_CTX_SIZE", "2002")
    settings = Settings.load({"port": "1003"}, config)
    assert (settings.port, settings.ctx_size, settings.batch_size, settings.host) == (1003, 2002, 33, "0.0.0.0")


def test_defaults_are_the_engine_s_and_suit_proxies() -> None:
    settings = Settings.load()
    assert settings.keep_alive > 75, "connections wait longer for another request than proxies do"
    for field in dataclasses.fields(EngineSettings):
        if field.name != "model_path":
            assert getattr(settings, field.name) == field.default, field.name


def test_keys_come_from_environment_and_file_and_never_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one-secret\n\n ada  two-secret \nada three-secret\n")
    monkeypatch.setenv("EDGE_PHI3_API_KEY", "first-secret,second-secret")
    settings = Settings.load({"api_key_file": str(keys)})
    digests = {key: digest_of(f"{key}-secret") for key in ("first", "second", "one", "two", "three")}
    unnamed = {digest: f"key-{digest.hex()[:6]}" for digest in digests.values()}
    assert settings.keys == unnamed | {digests["two"]: "ada", digests["three"]: "ada"}
    assert "secret" not in str(settings.keys)
    assert "secret" not in to_toml(settings)
    assert "secret" not in repr(settings)


@cases
def test_a_key_file_without_usable_keys_is_refused(tmp_path: Path, content: str | None) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match="--api-key-file") as caught:
        Settings.load({"api_key_file": str(keys)})
    assert "secret" not in str(caught.value)


@cases
def test_a_wrong_flag_is_one_sentence(name: str, value: object, sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({name: value})
    assert str(caught.value) == f"--{name.replace('_', '-')}: {sentence}"


@cases
def test_an_adapter_is_read_in_each_form_and_again_as_it_is_written(
    text: str, path: str, scale: float, name: str
) -> None:
    settings = Settings.load({"lora": [text]})
    assert settings.lora == ((Path(path), scale, name),)
    assert Settings.load({"lora": settings.model_dump()["lora"]}).lora == settings.lora


@cases
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    config = tmp_path / "config.toml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(SettingsError, match=sentence):
        Settings.load(config_file=config)


def test_a_wrong_variable_is_named_but_for_the_port_that_kubernetes_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_PHI3_PORT", "tcp://10.0.0.1:80")
    assert Settings.load().port == 8080
    monkeypatch.setenv("EDGE_PHI3_THREADS", "many")
    with pytest.raises(SettingsError, match=r"^EDGE_PHI3_THREADS: 'many' is not allowed"):
        Settings.load()


def test_values_are_taken_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("speculation = 5\n", encoding="utf-8")
    given = {"trusted_proxies": "10.0.0.0/8, ::1", "quant": "q8_0"}
    settings = Settings.load(given, tmp_path / "a.toml")
    found = settings.speculation, settings.trusted_proxies, settings.quant
    assert found == ("5", ("10.0.0.0/8", "::1"), "Q8_0")
