"""A rank of the Wan engine with compiled blocks, as on a card, whose memory runs out in the middle of a pass once a
file is there that the variable RUSHES_TEST_RANK_OOM names.

A program, to be started in the place of ``python -m rushes.engines.wan.rank``.
"""

import os
from pathlib import Path
from typing import Any, Final

from rushes.engines.wan import profiles, rank
from rushes.engines.wan.profiles import Means

ORDER: Final = "RUSHES_TEST_RANK_OOM"
COMPILING: Final = Means(None, "eager", None, "the processor multiplies no fp8")
"""torch looks at the code of the blocks as ever, and runs it as it is: no compiler is needed."""


class _Faulty(rank._Rank):
    def _look(self, *given: Any) -> None:
        import torch

        super()._look(*given)
        if Path(os.environ[ORDER]).exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


if __name__ == "__main__":
    rank._Rank = _Faulty  # type: ignore[misc]
    profiles.means_of = lambda _device: COMPILING
    rank.main()
