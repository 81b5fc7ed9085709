"""A model as the wire lists it. The keys are those that RunComfy's command line reads."""

from typing import Any

from rushes.catalog.load import Entry


def model_summary(entry: Entry, *, include_schema: bool = False) -> dict[str, Any]:
    """One element of ``models`` in the answer to a search."""
    model = entry.model
    summary: dict[str, Any] = {
        "model_id": model.id,
        "display_name": model.name,
        "description": model.description,
        "categories": list(model.categories),
        "output_type": model.output,
        "base_price_usd": model.price.base_usd,
        "price_unit": model.price.unit,
    }
    if model.price.note is not None:
        summary["pricing_note"] = model.price.note
    if include_schema:
        summary["input_schema"] = entry.input_schema
        summary["output_schema"] = entry.output_schema
    return summary


def model_detail(entry: Entry) -> dict[str, Any]:
    """The answer to a question for one model: the summary, both schemas and the sample input."""
    return {**model_summary(entry, include_schema=True), "sample": entry.model.sample}
