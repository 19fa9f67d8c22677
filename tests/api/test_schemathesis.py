"""Thousands of requests made from the OpenAPI document: none may break the service or fall off its own schema."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.api.conftest import PATIENCE, loader, ready

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
EXAMPLES = 120
LEAST_REQUESTS = 2000


def test_generated_requests_meet_the_document(model_path: Path, tmp_path: Path) -> None:
    with ready(loader(model_path), max_new_tokens=200, request_timeout=PATIENCE) as api:
        command = [
            sys.executable,
            "-c",
            "from schemathesis.cli import schemathesis; schemathesis()",
            "run",
            f"http://127.0.0.1:{api.port}/openapi.json",
            "--phases=examples,coverage,fuzzing",
            f"--checks={CHECKS}",
            f"--max-examples={EXAMPLES}",
            "--seed=1",
            f"--request-timeout={PATIENCE}",
            "--suppress-health-check=too_slow",
            "--no-color",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    found = re.search(r"(\d+) generated", result.stdout)
    assert found is not None
    assert int(found[1]) >= LEAST_REQUESTS
