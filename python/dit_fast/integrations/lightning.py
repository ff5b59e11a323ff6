"""Lightning: a callback that logs the run of a `lightning.Trainer`."""

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from dit_fast.errors import UnsupportedError
from dit_fast.recorder import Recorder

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("dit_fast.integrations.lightning needs lightning: pip install 'dit_fast[integrations]'") from error


class RecorderCallback(Callback):
    """Logs the run of a Lightning Trainer: `Trainer(..., callbacks=[RecorderCallback("runs/x")])`.

    The training DataLoader runs over `dit_fast.with_ids(dataset)`, so that a batch is (ids, x, y) and `training_step` takes
    `ids, x, y = batch`. `training_step` must call the module itself, `self(x)`, where dropout is active. Automatic
    optimization with one optimizer; gradient accumulation, clipping and schedules are logged as the Trainer does them.
    Every epoch ends with a mark, "epoch 1" and so on. `num_steps` is the number of steps logged.

    The log's model is the LightningModule: `Problem(module, per_sample_loss, dataset)`.

    path: of the log. ids: what finds the ids in a batch; its first element where not given. options: those of `Recorder`.

    Raises UnsupportedError at the start of training for several processes, half precision, manual optimization or several
    optimizers; and what `Recorder` raises.
    """

    def __init__(self, path: str | Path, ids: Callable[[Any], Any] = itemgetter(0), **options: Any) -> None:
        for name in ("clip_norm", "clip_value", "store_batches"):
            if name in options:
                raise TypeError(f"RecorderCallback has no option {name}: the Trainer's own settings say it")
        self._path, self._ids, self._options = path, ids, options
        self._recorder: Recorder | None = None

    @property
    def num_steps(self) -> int:
        """Steps logged so far."""
        return 0 if self._recorder is None else self._recorder.num_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record, the optimizer being made."""
        if trainer.world_size > 1:
            raise UnsupportedError(
                "RecorderCallback logs training in one process on one device; use dit_fast.Recorder in a loop"
            )
        if not str(trainer.precision).startswith(("32", "64")):
            raise UnsupportedError(
                f"the Trainer trains in precision {trainer.precision}: its steps cannot be reproduced; use 32-true"
            )
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise UnsupportedError("RecorderCallback logs automatic optimization with one optimizer")
        clip = trainer.gradient_clip_val or None
        by_value = str(trainer.gradient_clip_algorithm).lower().endswith("value")
        self._recorder = Recorder(
            self._path,
            pl_module,
            getattr(trainer.optimizers[0], "optimizer", trainer.optimizers[0]),
            clip_norm=None if by_value else clip,
            clip_value=clip if by_value else None,
            **self._options,
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Name the samples of the backward() that follows."""
        assert self._recorder is not None
        self._recorder.batch(self._ids(batch), scale=1 / trainer.accumulate_grad_batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the end of the epoch."""
        assert self._recorder is not None
        self._recorder.mark(f"epoch {trainer.current_epoch + 1}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        if self._recorder is not None:
            self._recorder.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the finished steps."""
        if self._recorder is not None:
            self._recorder.__exit__(type(exception), exception, exception.__traceback__)
