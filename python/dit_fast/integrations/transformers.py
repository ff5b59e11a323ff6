"""Hugging Face: a callback that logs the run of a `transformers.Trainer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dit_fast.errors import UnsupportedError
from dit_fast.recorder import Recorder

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("dit_fast.integrations.transformers needs transformers: pip install 'dit_fast[integrations]'") from error

SAMPLE_ID = "sample_id"


class WithSampleIds(Dataset[dict[str, Any]]):
    """A map-style dataset of dicts with each sample's position added as "sample_id"; collators stack it like a label.

    Give it to the Trainer as `train_dataset`, and the dataset itself to `Problem`. TypeError for a dataset without
    positions, or one whose items are no dicts.
    """

    def __init__(self, dataset: Any) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(f"WithSampleIds needs a map-style dataset (len and indexing), got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        if not isinstance(item, Mapping):
            raise TypeError(f"WithSampleIds needs items that are dicts, got {type(item).__name__} for sample {index}")
        return {**item, SAMPLE_ID: index}


class RecorderCallback(TrainerCallback):
    """Logs the run of a Trainer: `Trainer(..., train_dataset=WithSampleIds(data), callbacks=[RecorderCallback("runs/x")])`.

    `TrainingArguments` need remove_unused_columns=False, or the Trainer takes the ids away, and full precision (no fp16 or
    bf16). Gradient accumulation, clipping by max_grad_norm, schedules and dropout are logged as the Trainer does them. Every
    epoch ends with a mark, "epoch 1" and so on. `num_steps` is the number of steps logged.

    The per-sample loss of the `Problem` must be the one that the Trainer averages: for classification the cross entropy
    of each sample; for a language model the sum of the cross entropies of a sample's tokens, since the Trainer divides
    their total by the number of tokens in the step.

    path: of the log. options: those of `Recorder`, such as every=10, resume=True, store_batches is not among them.

    Raises UnsupportedError at the start of training for several processes or devices and for half precision, ValueError
    where a batch comes without ids; and what `Recorder` raises.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        for name in ("clip_norm", "clip_value", "reduction", "store_batches"):
            if name in options:
                raise TypeError(f"RecorderCallback has no option {name}: the Trainer's own settings say it")
        self._path, self._options = path, options
        self._recorder: Recorder | None = None
        self._handle: Any = None
        # what each backward() of the coming step was made of: ids, and 1 / the items that the Trainer divides by
        self._passes: list[tuple[Tensor, float | None]] = []

    @property
    def num_steps(self) -> int:
        """Steps logged so far."""
        return 0 if self._recorder is None else self._recorder.num_steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start to record, the Trainer's model and optimizer being made."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise UnsupportedError(
                "RecorderCallback logs training in one process on one device; use dit_fast.Recorder in a loop"
            )
        if args.fp16 or args.bf16:
            raise UnsupportedError("the Trainer trains in half precision: its steps cannot be reproduced; drop fp16 and bf16")
        if args.remove_unused_columns:
            raise ValueError("set TrainingArguments(remove_unused_columns=False): the Trainer would drop the samples' ids")
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        # in front of the Recorder's own hook, which looks at the shapes of the inputs
        self._handle = model.register_forward_pre_hook(self._take_ids, with_kwargs=True)
        clip = args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None
        try:
            self._recorder = Recorder(
                self._path, model, getattr(optimizer, "optimizer", optimizer), clip_norm=clip, **self._options
            )
        except BaseException:
            self._handle.remove()
            raise

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the samples of the step that follows."""
        passes, self._passes = self._passes, []
        assert self._recorder is not None
        for ids, share in passes:
            if share is None:  # the mean of each batch, and the mean of the batches
                self._recorder.batch(ids, scale=1 / len(passes))
            else:
                self._recorder.batch(ids, coefficients=torch.full((len(ids),), share, dtype=torch.float64))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the end of the epoch."""
        if self._recorder is not None and self._recorder.num_steps:
            self._recorder.mark(f"epoch {round(state.epoch or 0)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what is left."""
        self._handle.remove()
        if self._recorder is not None:
            self._recorder.close()

    def _take_ids(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes the ids out of a batch before the model sees it."""
        kwargs = dict(kwargs)
        ids = kwargs.pop(SAMPLE_ID, None)
        if model.training and torch.is_grad_enabled():
            if ids is None:
                raise ValueError(f"a batch came without '{SAMPLE_ID}': give the Trainer train_dataset=WithSampleIds(dataset)")
            items = kwargs.get("num_items_in_batch")
            self._passes.append((ids.detach().reshape(-1).cpu(), None if items is None else 1 / float(items)))
        return args, kwargs
