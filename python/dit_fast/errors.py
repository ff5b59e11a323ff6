"""The errors a user can meet beyond ValueError and TypeError, which are for arguments."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LogError(RuntimeError):
    """A log is damaged, incomplete, or belongs to another model or data set. The message names file and step."""


class UnsupportedError(RuntimeError):
    """A model, an optimizer or an operation that cannot be scored correctly. The message names it."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors that a user's own function or model raises become one ValueError, "what: the reason's first line".

    Ours go on as they are, and so does a lack of memory.
    """
    try:
        yield
    except (LogError, UnsupportedError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, KeyError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        raise ValueError(f"{what}: {lines[0] if lines else type(error).__name__}") from error
