"""Which models a slot's engine is warm for. Pure."""

from collections.abc import Iterable, Sequence

from rushes.catalog.model import Model
from rushes.catalog.workflow import workflow_of
from rushes.errors import ManifestError


def warm_models(last: Model | None, models: Iterable[Model], prefer: Sequence[str] = ()) -> tuple[str, ...]:
    """The ids of those of ``models`` that need no weights but those that ``last``, the model that ran last, has
    loaded; that one itself comes first. ``prefer`` are the variants of workflows that the engine takes.

    A model that lists no weights says nothing of what it needs: it is warm for itself alone.
    """
    if last is None:
        return ()
    held = _weights(last, prefer)
    others = (
        model.id
        for model in models
        if model.id != last.id and (needed := _weights(model, prefer)) and needed <= held
    )
    return (last.id, *others)


def _weights(model: Model, prefer: Sequence[str]) -> frozenset[str]:
    try:
        workflow = workflow_of(model, prefer)
    except ManifestError:
        return frozenset()  # told where it is run or checked; here it only means that nothing is known
    return frozenset(weight.file for weight in workflow.weights)
