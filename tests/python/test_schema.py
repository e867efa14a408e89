"""The published schema is valid, and the service responds as it says, whatever a client sends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import client, embedded, make_user
from openapi_spec_validator import OpenAPIV31SpecValidator
from running_service import THROTTLES_OFF

CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")

# Seconds for one run, much more than it needs.
LIMIT = 1200


def test_a_validator_accepts_the_schema(http):
    schema = http.get("/schema").json()
    assert schema["openapi"].startswith("3.1.")
    errors = [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in OpenAPIV31SpecValidator(schema).iter_errors()]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    ("query", "accept"), [("?format=yaml", "*/*"), ("", "application/yaml"), ("", "application/vnd.oai.openapi")]
)
def test_the_yaml_form_has_the_same_content(http, query, accept):
    answer = http.get("/schema" + query, headers={"Accept": accept})
    assert answer.status_code == 200
    assert "yaml" in answer.headers["content-type"] or "openapi" in answer.headers["content-type"]
    assert yaml.safe_load(answer.text) == http.get("/schema").json()


def test_every_operation_documents_its_errors_and_can_be_authorised(http):
    schema = http.get("/schema").json()
    schemes = schema["components"]["securitySchemes"]
    assert {"type": "http", "scheme": "bearer"}.items() <= next(iter(schemes.values())).items()
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            if method not in ("get", "post", "put", "patch", "delete"):
                continue
            name = f"{method.upper()} {path}"
            answers = operation["responses"]
            assert any(status.startswith("2") or status == "101" for status in answers), name
            security = operation.get("security", schema.get("security", []))
            # An empty requirement among the alternatives says that none is needed.
            if security and {} not in security:
                assert "401" in answers, name
            if "requestBody" in operation:
                assert {"400", "413", "415"} <= set(answers), name


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_pages_load_only_what_this_service_serves(http, page):
    answer = http.get(page)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "script-src 'self' 'unsafe" not in policy
    links = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert [link for link in links if link.startswith("./assets/")]
    for link in links:
        assert link.startswith(("./", "data:")), link
        if link.startswith("./"):
            assert http.get(link.removeprefix(".")).status_code == 200, link
    assert not re.search(r"<script(?![^>]*\bsrc=)", answer.text), "no inline script"


def run_schemathesis(service, *arguments):
    run = subprocess.run(
        [
            # No --checks: all are on by default, and naming them here would overrule the
            # configuration's exceptions.
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", "--phases", "examples,coverage,fuzzing,stateful",
            *arguments, f"{service.url}/schema",
        ],
        cwd=service.folder, env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)}, text=True, capture_output=True, timeout=LIMIT,
    )
    assert run.returncode == 0, f"{run.stdout[-30000:]}\n{run.stderr[-3000:]}\n{service.output()}"
    assert service.get("/readyz") == 200
    assert not [line for line in service.log() if line.get("level") == "ERROR"], service.output()
    print(run.stdout[-1500:])


@pytest.mark.parametrize(
    ("settings", "authorised"),
    [
        pytest.param(THROTTLES_OFF, True, id="with a token", marks=embedded),
        pytest.param(THROTTLES_OFF, False, id="without a token", marks=embedded),
        # The defaults: 429 is a response like the others, and must be documented.
        pytest.param({}, True, id="with a token and the throttles on"),
    ],
)
def test_no_request_gets_a_5xx_or_an_undocumented_answer(serve, settings, authorised):
    with serve(ACCESS_TOKEN_LIFETIME="1h", **settings) as service:
        with client(service) as http:
            user = make_user(http)
        header = ["--header", f"Authorization: Bearer {user.access}"] if authorised else []
        run_schemathesis(service, *header)
