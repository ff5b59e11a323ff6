"""The errors a user can meet beyond ValueError and TypeError, which are for arguments."""


class LogError(RuntimeError):
    """A log is damaged, incomplete, or belongs to another model or data set. The message names file and step."""


class UnsupportedError(RuntimeError):
    """A model, an optimizer or an operation that cannot be scored correctly. The message names it."""
