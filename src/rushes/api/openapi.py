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
    422: ("InvalidInput", "The input does not fit. `detail` names every field at fault."),
    429: ("TooManyRequests", "The key's rate limit or queue limit is reached."),
    500: ("InternalError", "The server made a mistake; its log has it under the X-Request-Id."),
    503: ("Unavailable", "The store cannot be reached. Nothing was accepted."),
}
_RETRY_AFTER: Final = frozenset({429, 503})
_EVERYWHERE: Final = (400, 401, 403, 405, 429, 500, 503)
"""What any route that asks for a key may answer."""

_STATES: Final = ["in_queue", "in_progress", "completed", "cancelled"]
_RESULTS: Final = ["in_queue", "in_progress", "succeeded", "failed", "cancelled"]


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
            errors=(405, 500),
            public=True,
        )
    }
    paths["/"] = {
        "get": _operation(
            "get_server",
            "server",
            "What answers here, and where to go on",
            {"200": _json_answer("Name, version and addresses.", {"type": "object"})},
            errors=(405, 500),
            public=True,
        )
    }
    paths["/healthz"] = {
        "get": _operation(
            "get_health",
            "server",
            "Whether the server can take requests",
            {"200": _json_answer("It can.", {"type": "object"})},
            errors=(405, 500, 503),
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
            "schemas": _schemas(),
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
    answer = _object(
        {
            "models": {"type": "array", "items": _ref("ModelSummary")},
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
    answer = _object({"categories": {"type": "array", "items": {"type": "string"}}}, ["categories"])
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
        {"200": {**_json_answer("Stored and queued.", _ref("Submitted")), "links": _links()}},
        description=model.description,
        errors=(*_EVERYWHERE, 404, 413, 422),
    )
    submit["requestBody"] = {"required": True, "content": {"application/json": body}}
    get = _operation(
        f"get_model_{word}",
        "models",
        f"The schemas and the price of {model.name}",
        {"200": _json_answer("The model.", _ref("ModelDetail"))},
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
        {"200": _json_answer("Its state now. A failed request is completed.", _ref("Status"))},
        errors=errors,
        parameters=[request_id],
    )
    result = _operation(
        "get_result",
        "requests",
        "The outcome of a request",
        {"200": _json_answer("Its outcome, or its state while there is none.", _ref("Result"))},
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
        {"202": _json_answer("Whether it was cancelled. A running request is not.", _ref("Cancelled"))},
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
        {"200": _json_answer("Checked and stored. Use `url` as an input.", _ref("File"))},
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
            "multipart/form-data": {"schema": _object({"file": binary}, ["file"])},
            "application/octet-stream": {"schema": binary},
        },
    }
    file_id = {"name": "file_id", "in": "path", "required": True, "schema": {"type": "string"}}
    get = _operation(
        "get_file",
        "files",
        "What is known of an uploaded file",
        {"200": _json_answer("The file's record.", _ref("File"))},
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
        "206": {"description": "The range asked for.", "headers": _answer_headers(), "content": content},
        "304": {"description": "Unchanged since the ETag sent.", "headers": _answer_headers()},
    }
    operation = _operation(
        "get_output",
        "files",
        "Download an output by its signed link",
        answers,
        description="Results carry these links; each call for a result renews them.",
        errors=(400, 403, 404, 405, 416, 500, 503),
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


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: _Json, required: list[str]) -> _Json:
    return {"type": "object", "properties": properties, "required": required}


def _json_answer(description: str, schema: _Json) -> _Json:
    return {
        "description": description,
        "headers": _answer_headers(),
        "content": {"application/json": {"schema": schema}},
    }


def _answer_headers(*, retry: bool = False) -> _Json:
    names = ["X-Request-Id", "Retry-After"] if retry else ["X-Request-Id"]
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error_answer(status: int) -> _Json:
    answer = _json_answer(_ERRORS[status][1], _ref("Error"))
    answer["headers"] = _answer_headers(retry=status in _RETRY_AFTER)
    return answer


def _headers() -> _Json:
    return {
        "X-Request-Id": {
            "description": "Names this HTTP request in the server's log.",
            "schema": {"type": "string"},
        },
        "Retry-After": {
            "description": "Seconds after which to try again.",
            "required": True,
            "schema": {"type": "integer", "minimum": 0},
        },
    }


def _schemas() -> _Json:
    text: _Json = {"type": "string"}
    link: _Json = {"type": "string", "format": "uri"}
    links: _Json = {"type": "array", "items": link}
    moment: _Json = {"type": "string", "format": "date-time"}
    position: _Json = {"type": "integer", "minimum": 1, "description": "1 is next. Only while in_queue."}
    seconds: _Json = {"type": "number", "minimum": 0}
    fraction = {"type": "number", "minimum": 0, "maximum": 1, "description": "How far it is."}
    detail = _object(
        {"loc": {"type": "array", "items": {"type": ["string", "integer"]}}, "msg": text, "type": text},
        ["loc", "msg", "type"],
    )
    summary = _summary_properties()
    return {
        "Error": _object(
            {
                "error_code": {"type": "integer", "description": "Stable; clients may branch on it."},
                "error_message": {"type": "string", "description": "What is wrong and what to do next."},
                "detail": {"type": "array", "items": detail},
            },
            ["error_code", "error_message"],
        ),
        "Submitted": _object(
            {"request_id": text, "status_url": link, "result_url": link, "cancel_url": link},
            ["request_id", "status_url", "result_url", "cancel_url"],
        ),
        "Status": _object(
            {
                "request_id": text,
                "status": {"type": "string", "enum": _STATES},
                "queue_position": position,
                "progress": fraction,
                "eta": {**seconds, "description": "Seconds that it may still take."},
                "stage": {"type": "string", "description": "What the engine does now."},
                "status_url": link,
                "result_url": link,
            },
            ["request_id", "status", "status_url", "result_url"],
        ),
        "Result": _object(
            {
                "request_id": text,
                "status": {"type": "string", "enum": _RESULTS},
                "model_id": text,
                "output": _ref("Output"),
                "files": {"type": "array", "items": _produced(), "description": "What is in the output."},
                "expired_at": {**moment, "description": "When retention removed the output."},
                "error": _ref("Failure"),
                "queue_position": position,
                "created_at": moment,
                "started_at": moment,
                "finished_at": moment,
                "engine": {"type": "string", "description": "What made the output."},
                "cost": {"type": "number", "minimum": 0, "description": "US dollars."},
            },
            ["request_id", "status", "created_at"],
        ),
        "Output": _object({"image": link, "video": link, "images": links, "videos": links}, []),
        "Failure": _object({"code": text, "message": text, "node": text, "field": text}, ["code", "message"]),
        "Cancelled": _object(
            {
                "request_id": text,
                "status": {"type": "string", "enum": _STATES},
                "outcome": {"type": "string", "enum": ["cancelled", "not_cancellable"]},
            },
            ["request_id", "status", "outcome"],
        ),
        "ModelSummary": _object(summary, _SUMMARY_REQUIRED),
        "ModelDetail": _object(
            {**summary, "sample": {"type": "object"}},
            [*_SUMMARY_REQUIRED, "input_schema", "output_schema", "sample"],
        ),
        "File": _object(
            {
                "id": text,
                "name": text,
                "content_type": text,
                "size": {"type": "integer", "minimum": 0, "description": "Bytes."},
                "url": {**link, "description": "Use it as an input."},
            },
            ["id", "url", "name", "content_type", "size"],
        ),
    }


def _produced() -> _Json:
    """One file of an output, as it was when it was stored."""
    pixels: _Json = {"type": "integer", "minimum": 1}
    return _object(
        {
            "url": {"type": "string", "format": "uri"},
            "content_type": {"type": "string"},
            "size": {"type": "integer", "minimum": 0, "description": "Bytes."},
            "width": pixels,
            "height": pixels,
            "frames": pixels,
            "fps": {"type": ["number", "null"]},
            "duration": {"type": ["number", "null"], "description": "Seconds."},
        },
        ["url", "content_type", "size", "width", "height"],
    )


_SUMMARY_REQUIRED: Final = ["model_id", "display_name", "categories", "base_price_usd", "price_unit"]


def _summary_properties() -> _Json:
    """The keys of :func:`rushes.catalog.listing.model_summary`."""
    return {
        "model_id": {"type": "string"},
        "display_name": {"type": "string"},
        "description": {"type": "string"},
        "categories": {"type": "array", "items": {"type": "string"}},
        "output_type": {"type": "string", "enum": ["image", "video"]},
        "base_price_usd": {"type": "number", "minimum": 0},
        "price_unit": {"type": "string", "enum": ["second", "output"]},
        "pricing_note": {"type": "string"},
        "input_schema": {"type": "object", "description": "In the dialect of this API: `float` is a number."},
        "output_schema": {"type": "object"},
    }
