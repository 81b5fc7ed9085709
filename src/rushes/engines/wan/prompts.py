"""What the text encoder makes of a prompt, kept: the same words come again, the negative prompt with every request.

The encoder of Wan has 5.7 thousand million parameters; where the card is small it waits in main memory
(:meth:`rushes.engines.wan.load.Loaded.text_on_card`), and fetching it costs more than running it.
"""

import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from rushes.engines.wan.load import Loaded

KEPT: Final = 64
"""Prompts; 4 MiB of main memory each at Wan's size (512 tokens of 4096 numbers in 16 bits)."""
TOKENS: Final = 512
"""Longer prompts are cut off there, as Wan's own code does; ``max_sequence_length`` in the pipelines."""


class Embeddings:
    """Of the prompts used last, by the prompt. May be asked from several threads; one at a time is answered."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._found: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._of: weakref.ref[Any] | None = None
        self._lock = threading.Lock()

    def get(
        self, loaded: "Loaded", prompt: str, negative: str | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of both prompts, 1 x :data:`TOKENS` x width each, on the card; of a ``negative`` that is None, None."""
        wanted = [prompt] if negative is None else [prompt, negative]
        with self._lock:
            self._forget_others(loaded.pipe.text_encoder)
            missing = [text for text in dict.fromkeys(wanted) if text not in self._found]
            if missing:
                with loaded.text_on_card(), torch.no_grad():
                    for text in missing:
                        self._found[text] = _encoded(loaded, text)
            found = [self._found[text].to(loaded.device) for text in wanted]
            for text in wanted:
                self._found.move_to_end(text)
            while len(self._found) > self._kept:
                self._found.popitem(last=False)
        return found[0], None if negative is None else found[1]

    def _forget_others(self, encoder: Any) -> None:
        """What another model's encoder made is of no use."""
        if self._of is None or self._of() is not encoder:
            self._found.clear()
            self._of = weakref.ref(encoder)


def _encoded(loaded: "Loaded", text: str) -> torch.Tensor:
    """By the pipeline's own code, one text at a time as the pipeline does it; in main memory."""
    found, _ = loaded.pipe.encode_prompt(
        prompt=text, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=loaded.device
    )
    made: torch.Tensor = found.cpu()
    return made
