"""The stored tensors of one matrix, and complaints about them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from fastllama.config.stored_quantization import Declared
from fastllama.loading.safetensors import SafeTensor
from fastllama.loading.stored import CheckpointError

logger = logging.getLogger(__name__)


class Parts:
    """The tensors that hold a matrix together, by the ends of their names.

    Args:
        module: the name of the linear map or embedding.
        tensors: by part.
        declared: what the checkpoint's configs say of quantization.
        said: warnings of the checkpoint's other matrices, which are not repeated.
    """

    def __init__(
        self, module: str, tensors: Mapping[str, SafeTensor], declared: Declared, said: set[str] | None = None
    ) -> None:
        self.module, self.declared, self._tensors = module, declared, tensors
        self._said = set() if said is None else said

    def __contains__(self, part: str) -> bool:
        return part in self._tensors

    def named(self, beginning: str) -> list[str]:
        """The parts whose names begin so."""
        return [part for part in self._tensors if part.startswith(beginning)]

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a part, which must be there."""
        return self._of(part).shape

    def dtype(self, part: str) -> str:
        """The dtype of a part, in safetensors' spelling."""
        return self._of(part).dtype

    def natural_dtype(self, part: str) -> torch.dtype:
        """The dtype that parameters have where nobody asks for another: that of a part if it is floating point."""
        return self._of(part).natural_dtype if self._of(part).is_float else torch.float32

    def whole(self, part: str) -> torch.Tensor:
        """The content of a part."""
        return self._of(part).whole()

    def rows(self, part: str, rows: slice) -> torch.Tensor:
        """Some rows of a part."""
        return self._of(part).rows(rows)

    def metadata(self, part: str) -> Mapping[str, str]:
        """What the header of the file of a part says besides its tensors."""
        return self._of(part).metadata()

    def check(self, part: str, shape: Sequence[int], dtypes: Sequence[str]) -> None:
        """Refuse a part of another shape or dtype.

        Raises:
            CheckpointError: naming it.
        """
        if self.shape(part) != tuple(shape):
            raise self.error(f"{part} has the shape {list(self.shape(part))}, expected {list(shape)}")
        if self.dtype(part) not in dtypes:
            raise self.error(f"{part} is stored as {self.dtype(part)}, expected {' or '.join(dtypes)}")

    def check_method(self, *methods: str) -> None:
        """Refuse a matrix whose parts are those of methods that the config does not name.

        Raises:
            CheckpointError: naming both.
        """
        if self.declared.method is not None and self.declared.method not in methods:
            raise self.error(f"its tensors are those of {methods[0]}, but quant_method is {self.declared.method!r}")

    def error(self, message: str) -> CheckpointError:
        """An error about this matrix."""
        return CheckpointError("a quantized matrix is not read:", [f"{self.module}: {message}"])

    def warn(self, message: str) -> None:
        """Warn about this matrix, unless the same has been said of another."""
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s: %s (said once)", self.module, message)

    def _of(self, part: str) -> SafeTensor:
        if part not in self._tensors:
            raise self.error(f"{part} is missing")
        return self._tensors[part]


FLOATS = ("F16", "BF16", "F32")
EXPONENTS = "F8_E8M0"  # powers of two, as scales
