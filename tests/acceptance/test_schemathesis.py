"""The OpenAPI document drives the running server: no 5xx, no answer that the document does not have."""

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from rushes.api.openapi import server_openapi
from rushes.catalog.load import Catalog
from support.server import Server

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]


def operations() -> list[tuple[str, str]]:
    document = server_openapi(Catalog.load().entries(), "http://x")
    return [
        (method, path)
        for path, item in document["paths"].items()
        for method in item
        if method in ("get", "post", "put", "delete", "patch", "head")
    ]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("schemathesis") / "data", engine="noop").start()
    yield server
    assert 0 == server.stop()
    assert '"event":"error"' not in server.log.read_text()


@pytest.fixture(scope="module")
def document(running: Server):
    return schemathesis.openapi.from_dict(json.loads(httpx.get(f"{running.url}/openapi.json").text))


@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"]
)
@pytest.mark.parametrize(("method", "path"), operations())
def test_the_document_holds(running: Server, document, method: str, path: str, mode: GenerationMode) -> None:
    operation = document[path][method]
    answers = 0

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def drive(case) -> None:
        nonlocal answers
        case.call_and_validate(
            base_url=running.url, checks=CHECKS, headers={"Authorization": f"Bearer {running.key}"}
        )
        answers += 1

    try:
        drive()
    except BaseException as error:
        if type(error).__name__ in ("Unsatisfiable", "SkipTest", "Skipped"):
            return  # an operation without inputs cannot be called wrongly
        raise
    assert answers
