"""The documents are valid OpenAPI 3.1, complete, and true to the catalog."""

from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from rushes.api.openapi import model_openapi, server_openapi
from rushes.catalog.listing import model_detail, model_summary
from rushes.catalog.load import Catalog

BASE = "https://example.test"
CATALOG = Catalog.load()
IDS = [entry.model.id for entry in CATALOG.entries()]
METHODS = {"get", "post"}


def server() -> dict[str, Any]:
    return server_openapi(CATALOG.entries(), BASE)


def of_model(id_: str) -> dict[str, Any]:
    entry = CATALOG.get(id_)
    assert entry is not None
    return model_openapi(entry, BASE)


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def check(document: dict[str, Any], name: str, instance: Any) -> None:
    """Against a schema of the document's components."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema_rs.Draft202012Validator(schema, validate_formats=True).validate(instance)


def test_the_servers_document_is_valid() -> None:
    OpenAPIV31SpecValidator(server()).validate()


@pytest.mark.parametrize("id_", IDS)
def test_a_models_document_is_valid(id_: str) -> None:
    OpenAPIV31SpecValidator(of_model(id_)).validate()


def test_the_validator_notices_a_mistake() -> None:
    document = server()
    del document["paths"]["/v1/files/{file_id}"]["get"]["parameters"]

    assert list(OpenAPIV31SpecValidator(document).iter_errors())


def test_every_route_is_there() -> None:
    expected = {
        "GET /v1/models",
        "GET /v1/models/categories",
        "GET /v1/requests/{request_id}/status",
        "GET /v1/requests/{request_id}/result",
        "POST /v1/requests/{request_id}/cancel",
        "POST /v1/files",
        "GET /v1/files/{file_id}",
        "GET /outputs/{key}",
        "GET /openapi.json",
        "GET /healthz",
        "GET /",
    }
    for id_ in IDS:
        expected |= {f"POST /v1/models/{id_}", f"GET /v1/models/{id_}", f"GET /v1/models/{id_}/openapi.json"}

    assert expected == operations(server()).keys()


def test_a_models_document_has_what_its_users_need() -> None:
    assert {
        f"POST /v1/models/{IDS[0]}",
        f"GET /v1/models/{IDS[0]}",
        f"GET /v1/models/{IDS[0]}/openapi.json",
        "GET /v1/requests/{request_id}/status",
        "GET /v1/requests/{request_id}/result",
        "POST /v1/requests/{request_id}/cancel",
        "POST /v1/files",
        "GET /v1/files/{file_id}",
    } == operations(of_model(IDS[0])).keys()


def test_operation_ids_are_unique_also_where_names_are_alike(tmp_path: Path) -> None:
    for id_ in ("a/b-c", "a/b.c", "a-b/c"):
        folder = tmp_path / id_
        folder.mkdir(parents=True)
        (folder / "model.toml").write_text(
            'name = "N"\noutput = "image"\n[[inputs]]\nname = "x"\ntitle = "X"\ntype = "string"\n'
        )
    document = server_openapi(Catalog.load(tmp_path).entries(), BASE)

    ids = [operation["operationId"] for operation in operations(document).values()]

    assert len(ids) == len(set(ids))
    assert {"submit_a_b_c", "submit_a_b_c_2", "submit_a_b_c_3"} <= set(ids)
    OpenAPIV31SpecValidator(document).validate()


def test_everything_but_signed_links_and_health_asks_for_a_key() -> None:
    document = server()

    assert [{"key": []}] == document["security"]
    assert "bearer" == document["components"]["securitySchemes"]["key"]["scheme"]
    assert {"GET /outputs/{key}", "GET /openapi.json", "GET /healthz", "GET /"} == {
        name for name, operation in operations(document).items() if operation.get("security") == []
    }


@pytest.mark.parametrize("id_", IDS)
def test_a_body_is_described_as_it_is_enforced(id_: str) -> None:
    entry = CATALOG.get(id_)
    assert entry is not None

    body = server()["paths"][f"/v1/models/{id_}"]["post"]["requestBody"]

    media = body["content"]["application/json"]
    assert body["required"] is True
    assert {key: value for key, value in entry.standard_schema.items() if key != "$schema"} == media["schema"]
    jsonschema_rs.Draft202012Validator(media["schema"]).validate(media["examples"]["sample"]["value"])
    assert '"float"' not in str(media["schema"]).replace("'", '"')


def test_errors_are_documented_with_their_body() -> None:
    document = server()
    submit = document["paths"][f"/v1/models/{IDS[0]}"]["post"]

    assert {"200", "400", "401", "403", "404", "405", "413", "422", "429", "431", "500", "503"} == set(
        submit["responses"]
    )
    for name, operation in operations(document).items():
        assert {"405", "500"} <= operation["responses"].keys(), name
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
                assert {"$ref": "#/components/schemas/Error"} == response["content"]["application/json"][
                    "schema"
                ]
                assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
            assert "X-Request-Id" in response["headers"]


def test_answers_of_the_wire_fit() -> None:
    document = server()
    id_, base = "019ab0f2-0000-7000-8000-000000000000", f"{BASE}/v1/requests"
    urls = {"status_url": f"{base}/{id_}/status", "result_url": f"{base}/{id_}/result"}
    created = {"created_at": "2026-11-21T04:40:00.123Z"}

    check(document, "Submitted", {"request_id": id_, **urls, "cancel_url": f"{base}/{id_}/cancel"})
    check(document, "Status", {"request_id": id_, "status": "in_queue", "queue_position": 3, **urls})
    check(document, "Status", {"request_id": id_, "status": "in_progress", "progress": 0.5, "eta": 4, **urls})
    check(
        document,
        "Result",
        {"request_id": id_, "status": "succeeded", "output": {"video": f"{BASE}/outputs/a.mp4"}, **created},
    )
    check(
        document,
        "Result",
        {"request_id": id_, "status": "failed", "error": {"code": "x", "message": "y"}, "cost": 0, **created},
    )
    file = {"url": BASE, "content_type": "video/mp4", "size": 9, "width": 64, "height": 64, "fps": None}
    check(document, "Result", {"request_id": id_, "status": "succeeded", "files": [file], **created})
    uploaded = {"id": "file_1", "url": BASE, "name": "", "content_type": "image/png", "size": 9}
    check(document, "File", uploaded)
    check(document, "Cancelled", {"request_id": id_, "status": "completed", "outcome": "not_cancellable"})
    detail = [{"loc": ["56_text"], "msg": "56_text is required", "type": "missing"}]
    check(document, "Error", {"error_code": 422001, "error_message": "No.", "detail": detail})


@pytest.mark.parametrize(
    ("name", "instance"),
    [
        ("Status", {"request_id": "x", "status": "failed", "status_url": BASE, "result_url": BASE}),
        ("Status", {"request_id": "x", "status": "in_queue", "queue_position": 0, "status_url": BASE}),
        ("Result", {"request_id": "x", "status": "completed", "created_at": "2026-11-21T04:40:00Z"}),
        ("Result", {"request_id": "x", "status": "failed", "created_at": "yesterday"}),
        ("Cancelled", {"request_id": "x", "status": "cancelled"}),
        ("Error", {"error_code": "422001", "error_message": "No."}),
    ],
)
def test_answers_that_are_not_the_wires_do_not_fit(name: str, instance: dict[str, Any]) -> None:
    with pytest.raises(jsonschema_rs.ValidationError):
        check(server(), name, instance)


@pytest.mark.parametrize("id_", IDS)
def test_listings_fit(id_: str) -> None:
    entry = CATALOG.get(id_)
    assert entry is not None

    check(server(), "ModelSummary", model_summary(entry))
    check(server(), "ModelSummary", model_summary(entry, include_schema=True))
    check(server(), "ModelDetail", model_detail(entry))
    described = server()["components"]["schemas"]["ModelDetail"]["properties"].keys()
    assert model_detail(entry).keys() <= described


def test_links_lead_from_a_submit_to_its_request() -> None:
    document = server()
    known = {operation["operationId"] for operation in operations(document).values()}

    for id_ in IDS:
        links = document["paths"][f"/v1/models/{id_}"]["post"]["responses"]["200"]["links"]
        assert {"status", "result", "cancel"} == links.keys()
        assert {link["operationId"] for link in links.values()} <= known


def test_documents_do_not_share_what_a_caller_might_change() -> None:
    document = server()
    document["paths"].clear()
    document["components"]["schemas"].clear()

    assert server()["paths"]
    assert server()["components"]["schemas"]
