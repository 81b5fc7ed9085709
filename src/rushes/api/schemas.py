"""The schemas of what the API answers: the components of its OpenAPI documents."""

from typing import Any, Final

_Json = dict[str, Any]

STATES: Final = ["in_queue", "in_progress", "completed", "cancelled"]
RESULTS: Final = ["in_queue", "in_progress", "succeeded", "failed", "cancelled"]


def ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


def object_of(properties: _Json, required: list[str]) -> _Json:
    return {"type": "object", "properties": properties, "required": required}


def schemas() -> _Json:
    text: _Json = {"type": "string"}
    link: _Json = {"type": "string", "format": "uri"}
    links: _Json = {"type": "array", "items": link}
    moment: _Json = {"type": "string", "format": "date-time"}
    position: _Json = {"type": "integer", "minimum": 1, "description": "1 is next. Only while in_queue."}
    seconds: _Json = {"type": "number", "minimum": 0}
    fraction = {"type": "number", "minimum": 0, "maximum": 1, "description": "How far it is."}
    detail = object_of(
        {"loc": {"type": "array", "items": {"type": ["string", "integer"]}}, "msg": text, "type": text},
        ["loc", "msg", "type"],
    )
    summary = _summary_properties()
    return {
        "Error": object_of(
            {
                "error_code": {"type": "integer", "description": "Stable; clients may branch on it."},
                "error_message": {"type": "string", "description": "What is wrong and what to do next."},
                "detail": {"type": "array", "items": detail},
            },
            ["error_code", "error_message"],
        ),
        "Submitted": object_of(
            {"request_id": text, "status_url": link, "result_url": link, "cancel_url": link},
            ["request_id", "status_url", "result_url", "cancel_url"],
        ),
        "Status": object_of(
            {
                "request_id": text,
                "status": {"type": "string", "enum": STATES},
                "queue_position": position,
                "progress": fraction,
                "eta": {**seconds, "description": "Seconds that it may still take."},
                "stage": {"type": "string", "description": "What the engine does now."},
                "status_url": link,
                "result_url": link,
            },
            ["request_id", "status", "status_url", "result_url"],
        ),
        "Result": object_of(
            {
                "request_id": text,
                "status": {"type": "string", "enum": RESULTS},
                "model_id": text,
                "output": ref("Output"),
                "files": {"type": "array", "items": _produced(), "description": "What is in the output."},
                "expired_at": {**moment, "description": "When retention removed the output."},
                "error": ref("Failure"),
                "queue_position": position,
                "created_at": moment,
                "started_at": moment,
                "finished_at": moment,
                "engine": {"type": "string", "description": "What made the output."},
                "remote_engine": {
                    "type": "string",
                    "description": "The engine of the server behind `engine`, where that is one and says so.",
                },
                "engine_cost_usd": {
                    "type": "number",
                    "minimum": 0,
                    "description": "What a remote engine took for it. Only where one ran it, and this is known.",
                },
                "cost": {
                    "type": "number",
                    "minimum": 0,
                    "description": "US dollars, by the operator's price; without one, what the engine took.",
                },
            },
            ["request_id", "status", "created_at"],
        ),
        "Output": object_of({"image": link, "video": link, "images": links, "videos": links}, []),
        "Failure": object_of({"code": text, "message": text, "node": text, "field": text}, ["code", "message"]),
        "Cancelled": object_of(
            {
                "request_id": text,
                "status": {"type": "string", "enum": STATES},
                "outcome": {"type": "string", "enum": ["cancelled", "not_cancellable"]},
            },
            ["request_id", "status", "outcome"],
        ),
        "ModelSummary": object_of(summary, _SUMMARY_REQUIRED),
        "ModelDetail": object_of(
            {**summary, "sample": {"type": "object"}},
            [*_SUMMARY_REQUIRED, "input_schema", "output_schema", "sample"],
        ),
        "File": object_of(
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
    return object_of(
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
