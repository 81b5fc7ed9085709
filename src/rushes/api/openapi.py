"""The OpenAPI 3.1 documents of the native API: one for the whole server, one for each model.

Pure functions over the catalog's entries. A model's id holds slashes, which a path parameter cannot, so every
model has concrete paths of its own. Input schemas are the ones that the server enforces, in standard JSON
Schema. Whoever changes a route changes its description here; a fuzzer that drives the running server with
this document holds the two together.
"""

import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, Final

from rushes.api.schemas import object_of, ref, schemas
from rushes.catalog.load import DEFAULT_LIMIT, MAX_LIMIT, Entry

_Json = dict[str, Any]

_ERRORS: Final[dict[int, tuple[str, str]]] = {
    400: ("BadRequest", "The request makes no sense: no JSON object, or a parameter that cannot be."),
    401: ("Unauthorized", "No API key, or one that is wrong or revoked."),
    403: ("Forbidden", "Not allowed: a signed link that is wrong or no longer valid, or a missing permission."),
    404: ("NotFound", "Nothing of this name, or it belongs to another account."),
    405: ("MethodNotAllowed", "The address exists, but not with this method."),
    413: ("BodyTooLarge", "The body is larger than the server accepts."),
    416: ("RangeNotSatisfiable", "The range lies outside the file."),
    431: (
        "HeadTooLarge",
        "The address and headers are larger than the server accepts; it closes the connection.",
    ),
    422: ("InvalidInput", "The input does not fit. `detail` names every field at fault."),
    429: ("TooManyRequests", "The key's rate limit or queue limit is reached."),
    500: ("InternalError", "The server made a mistake; its log has it under the X-Request-Id."),
    503: ("Unavailable", "The store cannot be reached. Nothing was accepted."),
}
_ERROR_HEADERS: Final = {405: "Allow", 416: "Content-Range", 429: "Retry-After", 503: "Retry-After"}
_PUBLIC: Final = (400, 405, 431, 500, 503)
"""What any route may answer: 400 to what is no HTTP, 503 also where there are too many connections."""
_EVERYWHERE: Final = (*_PUBLIC, 401, 403, 429)
"""What any route that asks for a key may answer."""


def server_openapi(entries: Iterable[Entry], base_url: str) -> _Json:
    """The document of the server at ``base_url`` (without a slash at its end), with all of its models."""
    paths: _Json = {"/v1/models": _models(), "/v1/models/categories": _categories()}
    taken: set[str] = set()
    for entry in entries:
        paths.update(_model_paths(entry, _unique(entry.model.id, taken)))
    paths.update(_request_paths(), **_file_paths())
    paths["/outputs/{key}"] = _outputs()
    paths["/openapi.json"] = {
        "get": _operation(
            "get_openapi",
            "server",
            "This document",
            {"200": _json_answer("An OpenAPI 3.1 document.", {"type": "object"})},
            errors=_PUBLIC,
            public=True,
        )
    }
    paths["/"] = {
        "get": _operation(
            "get_server",
            "server",
            "What answers here, and where to go on",
            {"200": _json_answer("Name, version and addresses.", {"type": "object"})},
            errors=_PUBLIC,
            public=True,
        )
    }
    paths["/healthz"] = {
        "get": _operation(
            "get_health",
            "server",
            "Whether the server can take requests",
            {"200": _json_answer("It can.", {"type": "object"})},
            errors=_PUBLIC,
            public=True,
        )
    }
    about = "Generative image and video models behind one durable queue."
    return _document("Rushes", about, base_url, paths)


def model_openapi(entry: Entry, base_url: str) -> _Json:
    """The document for one model: its own routes, and those that its requests and input files need."""
    model = entry.model
    paths = {**_model_paths(entry, _unique(model.id, set())), **_request_paths(), **_file_paths()}
    return _document(model.name, model.description, base_url, paths)


def _document(title: str, description: str, base_url: str, paths: _Json) -> _Json:
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "description": description, "version": version("rushes")},
        "servers": [{"url": base_url}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "`rushes keys create` makes one."}
            },
            "headers": _headers(),
            "schemas": schemas(),
            "responses": {name: _error_answer(status) for status, (name, _) in _ERRORS.items()},
        },
    }


# -- routes -------------------------------------------------------------------------------------------------
def _models() -> _Json:
    page = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
    parameters = [
        _query("search", "Words that the id, name, description or categories hold.", {"type": "string"}),
        _query("category", "Only models of this category.", {"type": "string"}),
        _query("kind", "Only models that make this.", {"type": "string", "enum": ["image", "video"]}),
        _query("include_schema", "Add each model's schemas.", {"type": "boolean", "default": False}),
        _query("limit", "Models on this page.", page),
        _query(
            "offset",
            "Models before this page.",
            {"type": "integer", "minimum": 0, "maximum": 1_000_000, "default": 0},
        ),
    ]
    answer = object_of(
        {
            "models": {"type": "array", "items": ref("ModelSummary")},
            "total": {"type": "integer", "minimum": 0},
        },
        ["models", "total"],
    )
    return {
        "get": _operation(
            "list_models",
            "models",
            "Search the catalog",
            {"200": _json_answer("One page of models, by id.", answer)},
            parameters=parameters,
        )
    }


def _categories() -> _Json:
    answer = object_of({"categories": {"type": "array", "items": {"type": "string"}}}, ["categories"])
    return {
        "get": _operation(
            "list_categories",
            "models",
            "Every category of the catalog",
            {"200": _json_answer("The categories, sorted.", answer)},
        )
    }


def _model_paths(entry: Entry, word: str) -> _Json:
    model = entry.model
    body_schema = {key: value for key, value in entry.standard_schema.items() if key != "$schema"}
    body: _Json = {"schema": body_schema, "examples": {"sample": {"value": model.sample}}}
    submit = _operation(
        f"submit_{word}",
        "models",
        f"Submit a request to {model.name}",
        {"200": {**_json_answer("Stored and queued.", ref("Submitted")), "links": _links()}},
        description=model.description,
        errors=(*_EVERYWHERE, 404, 413, 422),
    )
    submit["requestBody"] = {"required": True, "content": {"application/json": body}}
    get = _operation(
        f"get_model_{word}",
        "models",
        f"The schemas and the price of {model.name}",
        {"200": _json_answer("The model.", ref("ModelDetail"))},
        errors=(*_EVERYWHERE, 404),
    )
    document = _operation(
        f"get_model_openapi_{word}",
        "models",
        f"The OpenAPI document of {model.name}",
        {"200": _json_answer("An OpenAPI 3.1 document.", {"type": "object"})},
        errors=(*_EVERYWHERE, 404),
    )
    path = f"/v1/models/{model.id}"
    return {path: {"get": get, "post": submit}, f"{path}/openapi.json": {"get": document}}


def _request_paths() -> _Json:
    request_id = {
        "name": "request_id",
        "in": "path",
        "required": True,
        "description": "As the submit answered it.",
        "schema": {"type": "string", "format": "uuid"},
    }
    errors = (*_EVERYWHERE, 404)
    status = _operation(
        "get_status",
        "requests",
        "The state of a request",
        {"200": _json_answer("Its state now. A failed request is completed.", ref("Status"))},
        errors=errors,
        parameters=[request_id],
    )
    result = _operation(
        "get_result",
        "requests",
        "The outcome of a request",
        {"200": _json_answer("Its outcome, or its state while there is none.", ref("Result"))},
        errors=errors,
        parameters=[
            request_id,
            _query("include_cost", "Add the cost in US dollars.", {"type": "boolean", "default": False}),
        ],
    )
    cancel = _operation(
        "cancel_request",
        "requests",
        "Cancel a request that is still queued",
        {"202": _json_answer("Whether it was cancelled. A running request is not.", ref("Cancelled"))},
        errors=(*errors, 413),
        parameters=[request_id],
    )
    return {
        "/v1/requests/{request_id}/status": {"get": status},
        "/v1/requests/{request_id}/result": {"get": result},
        "/v1/requests/{request_id}/cancel": {"post": cancel},
    }


def _file_paths() -> _Json:
    upload = _operation(
        "upload_file",
        "files",
        "Upload an input file",
        {"200": _json_answer("Checked and stored. Use `url` as an input.", ref("File"))},
        description="The content is sniffed; no Content-Type and no file name is trusted.",
        errors=(*_EVERYWHERE, 413, 422),
    )
    binary = {"type": "string", "format": "binary"}
    upload["parameters"] = [
        {
            "name": "X-File-Name",
            "in": "header",
            "description": "The name of a file that is sent bare; a form carries its own.",
            "schema": {"type": "string"},
        }
    ]
    upload["requestBody"] = {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": object_of({"file": binary}, ["file"])},
            "application/octet-stream": {"schema": binary},
        },
    }
    file_id = {"name": "file_id", "in": "path", "required": True, "schema": {"type": "string"}}
    get = _operation(
        "get_file",
        "files",
        "What is known of an uploaded file",
        {"200": _json_answer("The file's record.", ref("File"))},
        errors=(*_EVERYWHERE, 404),
        parameters=[file_id],
    )
    return {"/v1/files": {"post": upload}, "/v1/files/{file_id}": {"get": get}}


def _outputs() -> _Json:
    parameters = [
        {"name": "key", "in": "path", "required": True, "schema": {"type": "string"}},
        _query("expires", "Seconds since the epoch.", {"type": "string"}, required=True),
        _query("signature", "What makes the link valid until then.", {"type": "string"}, required=True),
        {"name": "Range", "in": "header", "schema": {"type": "string"}, "example": "bytes=0-1023"},
    ]
    content: _Json = {"image/*": {}, "video/*": {}, "application/octet-stream": {}}
    answers: _Json = {
        "200": {"description": "The whole file.", "headers": _answer_headers(), "content": content},
        "206": {
            "description": "The range asked for, with GET.",
            "headers": _answer_headers(),
            "content": content,
        },
        "304": {"description": "Unchanged since the ETag sent.", "headers": _answer_headers()},
    }
    operation = _operation(
        "get_output",
        "files",
        "Download an output by its signed link",
        answers,
        description="Results carry these links; each call for a result renews them.",
        errors=(*_PUBLIC, 403, 404, 416),
        parameters=parameters,
        public=True,
    )
    return {"get": operation}


# -- parts --------------------------------------------------------------------------------------------------
def _operation(
    id_: str,
    tag: str,
    summary: str,
    answers: _Json,
    *,
    description: str = "",
    errors: Iterable[int] = _EVERYWHERE,
    parameters: list[_Json] | None = None,
    public: bool = False,
) -> _Json:
    responses = answers | {
        str(status): {"$ref": f"#/components/responses/{_ERRORS[status][0]}"} for status in sorted(errors)
    }
    operation: _Json = {"operationId": id_, "tags": [tag], "summary": summary}
    if description:
        operation["description"] = description
    if parameters:
        operation["parameters"] = parameters
    if public:
        operation["security"] = []
    return {**operation, "responses": responses}


def _query(name: str, description: str, schema: _Json, *, required: bool = False) -> _Json:
    return {"name": name, "in": "query", "required": required, "description": description, "schema": schema}


def _unique(id_: str, taken: set[str]) -> str:
    """``id_`` as a word for an operation's id, which no other id has."""
    stem = word = re.sub(r"[^a-z0-9]+", "_", id_)
    number = 1
    while word in taken:
        number += 1
        word = f"{stem}_{number}"
    taken.add(word)
    return word


def _links() -> _Json:
    request_id = {"request_id": "$response.body#/request_id"}
    return {
        name: {"operationId": operation, "parameters": request_id}
        for name, operation in (
            ("status", "get_status"),
            ("result", "get_result"),
            ("cancel", "cancel_request"),
        )
    }


def _json_answer(description: str, schema: _Json) -> _Json:
    return {
        "description": description,
        "headers": _answer_headers(),
        "content": {"application/json": {"schema": schema}},
    }


def _answer_headers(*more: str) -> _Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *more)}


def _error_answer(status: int) -> _Json:
    answer = _json_answer(_ERRORS[status][1], ref("Error"))
    if status in _ERROR_HEADERS:
        answer["headers"] = _answer_headers(_ERROR_HEADERS[status])
    return answer


def _headers() -> _Json:
    return {
        "X-Request-Id": {
            "description": "Names this HTTP request in the server's log.",
            "schema": {"type": "string"},
        },
        "Allow": {
            "description": "The methods that the address takes.",
            "required": True,
            "schema": {"type": "string"},
        },
        "Content-Range": {
            "description": "`bytes */` and the size of the file.",
            "required": True,
            "schema": {"type": "string"},
        },
        "Retry-After": {
            "description": "Seconds after which to try again.",
            "required": True,
            "schema": {"type": "integer", "minimum": 0},
        },
    }
