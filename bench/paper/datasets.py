"""Two-class data as the paper has it, read from the folder DIT_FAST_DATA and drawn anew for each seed.

adult (income), news (20 Newsgroups, ibm or mac), mnist (1 or 7), emnist (A or B), cifar (plane or car). "digits" (1 or 7
of scikit-learn's 8×8 images) needs no files: for trying the scripts.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("DIT_FAST_DATA") or Path(__file__).parents[3] / "shared" / "data")


@dataclass(frozen=True)
class Split:
    """Inputs float32 [n, features] or [n, channels, height, width] and labels float32 [n] in {0, 1}."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor

    def with_flips(self, share: float, seed: int) -> tuple["Split", Tensor]:
        """The same with `share` of the training labels flipped, and which [n] bool."""
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(1000 + seed))
        flipped = torch.zeros(len(self.y), dtype=torch.bool)
        flipped[order[: round(share * len(order))]] = True
        return replace(self, y=torch.where(flipped, 1 - self.y, self.y)), flipped


def load(name: str, seed: int, num_train: int, num_val: int, num_test: int = 2000) -> Split:
    """Training and validation samples drawn from the data's training part, test samples from its test part (all, if fewer)."""
    x, y, x_test, y_test = _read(name)
    if len(x) < num_train + num_val:
        raise ValueError(f"{name} has {len(x)} training samples, fewer than {num_train} + {num_val}")
    rng = np.random.default_rng(seed)
    order, test = rng.permutation(len(x)), rng.permutation(len(x_test))[:num_test]
    train, val = order[:num_train], order[num_train : num_train + num_val]
    parts = (x[train], y[train], x[val], y[val], x_test[test], y_test[test])
    return Split(*(torch.tensor(part, dtype=torch.float32) for part in parts))


@lru_cache
def _read(name: str) -> tuple[Any, Any, Any, Any]:
    if name not in READERS:
        raise ValueError(f"data {name!r} is not one of {', '.join(READERS)}")
    return READERS[name]()


def _pick(x: Any, y: Any, zero: int, one: int, scale: float = 255.0) -> tuple[Any, Any]:
    """The images of two classes as [n, channels, height, width] in 0..1, and 0 or 1."""
    chosen = (y == zero) | (y == one)
    x = x[chosen] / np.float32(scale)
    return x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2), (y[chosen] == one).astype(float)


def _arrays(file: str) -> dict[str, Any]:
    with np.load(FOLDER / file) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _mnist() -> tuple[Any, Any, Any, Any]:
    z = _arrays("mnist.npz")
    return *_pick(z["x_train"], z["y_train"], 1, 7), *_pick(z["x_test"], z["y_test"], 1, 7)


def _emnist() -> tuple[Any, Any, Any, Any]:
    z = _arrays("emnist_letters_ab.npz")
    return *_pick(z["x_train"], z["y_train"], 0, 1), *_pick(z["x_test"], z["y_test"], 0, 1)


def _cifar() -> tuple[Any, Any, Any, Any]:
    parts = [_pick(z["x"], z["y"], 0, 1) for z in map(_arrays, ("cifar10_train_10k.npz", "cifar10_plane_car_extra.npz"))]
    test = _arrays("cifar10_test_2k.npz")
    x_test, y_test = _pick(test["x"], test["y"], 0, 1)
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    return 4 * x - 2, y, 4 * x_test - 2, y_test


def _digits() -> tuple[Any, Any, Any, Any]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = _pick(data.images, data.target, 1, 7, scale=16.0)
    return x[::2], y[::2], x[1::2], y[1::2]


def _news() -> tuple[Any, Any, Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    with gzip.open(FOLDER / "20news_ibm_mac.json.gz", "rt", encoding="utf-8") as file:
        parts = json.load(file)
    found: list[Any] = []
    vectorizer = TfidfVectorizer(max_features=1000, stop_words="english", sublinear_tf=True)
    for name in ("train", "test"):
        rows = [(text, target) for text, target in zip(parts[name]["text"], parts[name]["target"], strict=True) if text.strip()]
        texts, targets = zip(*rows, strict=True)
        matrix = vectorizer.fit_transform(texts) if name == "train" else vectorizer.transform(texts)
        found += [matrix.toarray(), np.array(targets, dtype=float)]
    return tuple(found)  # type: ignore[return-value]


def _adult() -> tuple[Any, Any, Any, Any]:
    train, test = (_table(f"adult-{part}.csv.gz") for part in ("training", "test"))
    columns: list[list[Any]] = [[], []]
    for ours, theirs in zip(train.T[:-1], test.T[:-1], strict=True):
        try:
            numbers = ours.astype(float)
            mean, spread = numbers.mean(), numbers.std()
            encoded = [(values.astype(float)[:, None] - mean) / spread for values in (ours, theirs)]
        except ValueError:  # words
            encoded = [values[:, None] == np.unique(ours) for values in (ours, theirs)]
        for side, values in zip(columns, encoded, strict=True):
            side.append(values)
    x, x_test = (np.concatenate(side, axis=1).astype(np.float32) for side in columns)
    y, y_test = (np.char.startswith(part.T[-1], ">50K").astype(float) for part in (train, test))
    return x, y, x_test, y_test


def _table(file: str) -> Any:
    with gzip.open(FOLDER / file, "rt", encoding="utf-8") as lines:
        rows = [[value.strip() for value in line.split(",")] for line in lines]
    return np.array([row for row in rows if len(row) == 15])


READERS: dict[str, Callable[[], tuple[Any, Any, Any, Any]]] = {
    "adult": _adult,
    "news": _news,
    "mnist": _mnist,
    "emnist": _emnist,
    "cifar": _cifar,
    "digits": _digits,
}
