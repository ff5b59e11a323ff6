"""The one progress bar of long work."""

from tqdm import tqdm


def progress_bar(total: int, what: str, show: bool | None) -> tqdm:
    """A bar over `total` steps. show: None = on a terminal, once the work has taken two seconds; True; False."""
    return tqdm(total=total, desc=what, unit="step", delay=0 if show else 2, disable=None if show is None else not show)
