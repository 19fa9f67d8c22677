"""A model behind a certificate of the site's own: what `model.caBundle` mounts is what the programs trust."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.catalog.hub_server import HubServer, Repository
from tests.golden.checkpoints import write_checkpoint
from tests.helm import test_journey as journey
from tests.helm.chart import Object, preparer, render


@pytest.fixture(scope="module")
def private_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Path]]:
    """A mirror of the Hub with a certificate that nobody knows, and that certificate."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("authority")
    words = f"{openssl} req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out ca.crt -subj /CN=site"
    command = [*words.split(), "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    with HubServer() as private:
        private._server.socket = context.wrap_socket(private._server.socket, server_side=True)
        private.endpoint, private.cdn = (url.replace("http:", "https:") for url in (private.endpoint, private.cdn))
        checkpoint = write_checkpoint(folder / "tiny", hidden_size=256)
        private.repositories[journey.REPOSITORY] = Repository.of(checkpoint)
        private.repositories["site/files"] = Repository({"model.gguf": journey.CONTENT})
        yield private, folder / "ca.crt"


@pytest.mark.parametrize("way", ["the Hub", "a URL"])
@pytest.mark.parametrize("known", [True, False])
def test_a_private_authority_is_trusted_where_it_is_given(
    private_hub: tuple[HubServer, Path], tmp_path: Path, way: str, known: bool
) -> None:
    private, certificate = private_hub
    model: Object = {"caBundle": {"existingConfigMap": "trust"}} if known else {}
    if way == "the Hub":
        model["endpoint"] = private.endpoint
    else:
        model |= {"url": f"{private.endpoint}/site/files/resolve/main/model.gguf", "sha256": journey.SHA256}
    objects = render(journey.SMALL | {"model": model, "storage": {"mountPath": str(tmp_path)}})
    container = preparer(objects)
    if way == "a URL":
        container["command"][1:2] = ["-c", journey.program_of(objects)]
    # Its mount: the file that the ConfigMap of the site holds.
    env = journey.environment_of(container, FETCH_PATIENCE="0")
    env |= {name: str(certificate) for name, value in env.items() if value == "/etc/edge-phi3/ca/ca.crt"}
    ((code, _, log),) = journey.run_together(journey.command_of(container), env, 1)
    assert (code == 0) is known, log
    assert known or "CERTIFICATE_VERIFY_FAILED" in log
