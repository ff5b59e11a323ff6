"""Training samples by id: naming them in a loader, fetching a batch of them, moving it to a device and dtype."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

Unpacked = tuple[tuple[Any, ...], dict[str, Any], Any]


class _WithIds(Dataset):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.dataset[index]
        return (index, *item) if isinstance(item, tuple | list) else (index, item)


def with_ids(dataset: Any) -> Dataset:
    """The same map-style dataset with each sample's id in front: yields (id, *item), or (id, item) for a dict item.

    The id is the sample's position in `dataset`, which is what the log and every score are indexed by; any shuffling
    DataLoader may stand behind it. Raises TypeError for an iterable-style dataset, whose samples have no position.
    """
    if not _is_map_style(dataset):
        raise TypeError(f"with_ids needs a map-style dataset (len and indexing), got {type(dataset).__name__}")
    return _WithIds(dataset)


class Samples:
    """`data` of a Problem behind one question: the batch of these ids, collated as in training."""

    def __init__(self, data: Any, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        if isinstance(data, _WithIds):
            data = data.dataset
        if type(data) is TensorDataset and collate_fn is None:
            data = tuple(data.tensors)
        self._tensors: Any = None
        # a list of items that are tuples or dicts is a dataset, one item per sample
        listed = isinstance(data, list) and all(isinstance(item, tuple | list | Mapping) for item in data)
        if not listed and isinstance(data, tuple | list | Mapping | Tensor | np.ndarray) and leaves(data, array=True):
            self._tensors = map_tensors(data, torch.as_tensor, array=True)
            sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves(self._tensors)}
            if len(sizes) != 1:
                raise ValueError(f"data: its tensors have different numbers of samples {sorted(sizes)}")
            self.num_samples = sizes.pop()
        elif _is_map_style(data):
            self.num_samples = len(data)
        else:
            raise TypeError(
                f"data must be tensors, such as (x, y), or a map-style dataset (len and indexing), got {type(data).__name__}"
            )
        self._dataset = data
        self._collate = collate_fn or default_collate

    def batch(self, ids: Tensor) -> Any:
        """The samples `ids` [B] in that order, on the data's own device and in its own dtype."""
        if self._tensors is not None:
            return map_tensors(self._tensors, lambda leaf: leaf[ids.to(leaf.device)])
        return self._collate([self._dataset[int(i)] for i in ids])


def default_unpack(batch: Any) -> Unpacked:
    """(x, y) → model(x) against y; a mapping with "labels" → model(**rest) against the labels."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return (), {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    kind = f"{len(batch)} items" if isinstance(batch, Sequence) else type(batch).__name__
    raise TypeError(
        f"a batch of {kind} is neither (x, y) nor a dict with 'labels': pass unpack(batch) -> (args, kwargs, target)"
    )


def map_tensors(tree: Any, function: Callable[[Any], Any], array: bool = False) -> Any:
    """`tree` with every tensor (with `array`, every numpy array too) replaced; other leaves and containers are kept."""
    if isinstance(tree, Tensor) or (array and isinstance(tree, np.ndarray)):
        return function(tree)
    if isinstance(tree, Mapping):
        copied = copy.copy(tree)
        for key in tree:
            copied[key] = map_tensors(tree[key], function, array)  # type: ignore[index]
        return copied
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(item, function, array) for item in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(item, function, array) for item in tree)
    return tree


def leaves(tree: Any, array: bool = False) -> list[Any]:
    """The tensors of a tree in a fixed order."""
    found: list[Any] = []
    map_tensors(tree, lambda leaf: found.append(leaf) or leaf, array)  # type: ignore[func-returns-value]
    return found


def place(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Every tensor on `device`, the floating ones in `dtype`."""
    return map_tensors(tree, lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype))


def as_ids(ids: Any, name: str = "ids") -> Tensor:
    """int64 [n] on the CPU from any sequence of integers; TypeError or ValueError names `name`."""
    if isinstance(ids, Iterable) and not isinstance(ids, Tensor | np.ndarray | Sequence):
        ids = list(ids)
    tensor = torch.as_tensor(ids if not isinstance(ids, Sequence) or len(ids) else np.empty(0, np.int64))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    if tensor.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(tensor.shape)}")
    return tensor.to("cpu", torch.int64)


def _is_map_style(data: Any) -> bool:
    return not isinstance(data, IterableDataset) and hasattr(data, "__len__") and hasattr(data, "__getitem__")
