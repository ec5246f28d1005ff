"""The training loop: seeded batches, one optimizer, validation, checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from offtower.config import Config, TrainingConfig
from offtower.crossfit.fold_towers import reward_folds
from offtower.data.order import Cursor, EpochOrder
from offtower.data.reader import BatchReader, Step
from offtower.errors import StoppedError
from offtower.interruption import Interruption
from offtower.metrics import MetricsLog
from offtower.models.optimizer import TableUpdates, finish_updates, make_optimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.seeds import derive_seed, seed_torch
from offtower.training.checkpoints import CheckpointStore, Progression
from offtower.training.checkpoints.due import CheckpointTimes, Due
from offtower.training.distributed.gradients import GradientSum
from offtower.training.epoch_metrics import EpochSums, StepMetricsQueue, diagnostics_line
from offtower.training.schedule import LearningRate, Temperature, WeightAverage
from offtower.training.step import StepDiagnostics, StepKey, TrainingStep
from offtower.training.validation import ValidationScore, Validator

EpochHook = Callable[[TwoTowerPolicy, int], dict[str, float]]
"""Called after each epoch with the policy on the CPU; its result is only added to the metrics."""

Start = Callable[[torch.optim.Optimizer], None]
"""Gives a new optimizer its state."""


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of training; the policy that was passed in holds the selected weights."""

    epochs: int
    steps: int
    selected_step: int
    """Step of the selected weights: the best validation's, else the last."""
    validation: float | None
    """Lower bound of the value at `selected_step`, valid for the best of all validations."""
    stopped_early: bool
    history: list[dict[str, Any]]
    chosen: str | None = None
    """Candidate chosen by objective=auto; `validation` is then from held-out training rows."""
    advice: str | None = None
    """What objective=auto recommends: to keep the logging policy, or how to serve the new one."""


@dataclass(frozen=True)
class TrainingOutputs:
    """Where training writes, and what may stop it.

    Attributes:
        store: of checkpoints; None trains in memory only.
        metrics: of the first worker.
        on_epoch_end: adds numbers to the metrics, such as a simulator's true value.
    """

    store: CheckpointStore | None = None
    metrics: MetricsLog = field(default_factory=lambda: MetricsLog(None))
    progress: Progress = field(default_factory=Progress)
    on_epoch_end: EpochHook | None = None
    interruption: Interruption = field(default_factory=Interruption)


class Trainer:
    """Trains one policy, on this process or on several that share every batch.

    Args:
        config: the run's.
        data: opened logs and encodings.
        step: the loss of a batch, with the policy that is trained in place.
        validate: scores the policy on the validation log; None keeps the last epoch's weights.
        outputs: where to write.
        start: called with the optimizer before the first step, unless a checkpoint is loaded; sets
            the weights too.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        step: TrainingStep,
        *,
        validate: Validator | None = None,
        outputs: TrainingOutputs | None = None,
        start: Start | None = None,
    ) -> None:
        self.config = config
        self.policy = step.policy
        self.step = step
        self._data = data
        self._settings = config.training
        self._validate = validate
        outputs = outputs or TrainingOutputs()
        self._store, self._metrics = outputs.store, outputs.metrics
        self._progress, self._on_epoch_end = outputs.progress, outputs.on_epoch_end
        self._gradients = GradientSum(self.policy, step.workers, step.owned)
        self._optimizer = make_optimizer(
            self._settings.optimizer,
            self.policy,
            self._settings.learning_rate,
            self._settings.weight_decay,
            _table_updates(self._settings, sampled=step.proposal is not None),
            self._settings.table_learning_rate,
        )
        self._take_over = start
        self._rate = LearningRate(self._settings, self._optimizer)
        self._temperature = Temperature(self._settings, self.policy)
        share = self._settings.weight_average
        self._average = None if share is None else WeightAverage(self.policy, share)
        self._best_in_memory: dict[str, Tensor] | None = None
        self._interruption = outputs.interruption
        self._times = CheckpointTimes(
            self._settings.checkpoint_every_seconds, self._store, step.workers, self._interruption
        )

    def fit(self, *, resume: bool = False) -> TrainingResult:
        """Train to the last epoch or an early stop, from the newest checkpoint if `resume`.

        Raises:
            StoppedError: the interruption of the outputs asked to; the newest checkpoint is of the
                last step.
        """
        progression = self._start(resume)
        with self.reader() as reader, self._interruption.deferred():
            if progression.epoch_ends:
                self._end_epoch(progression)
            while progression.cursor.epoch < self._settings.epochs and not progression.finished:
                self._run_epoch(reader, progression)
                self._end_epoch(progression)
        if self._average is not None:
            self._average.swap_in()
        if self.step.proposal is not None:
            self.step.proposal.close()
        if self._store is not None:
            self._store.finish()
        self._load_best(progression)
        return TrainingResult(
            epochs=progression.cursor.epoch,
            steps=progression.step,
            selected_step=progression.best_step or progression.step,
            validation=progression.best_low,
            stopped_early=progression.cursor.epoch < self._settings.epochs,
            history=self._metrics.epochs(),
        )

    def reader(self) -> BatchReader:
        """Open the batches of the training log, by fold of the reward model if there is one."""
        model, seed = self.step.reward_model, self.config.seed
        folds = 1 if model is None else model.num_folds
        order = EpochOrder(
            self._data.train.row_group_sizes,
            self._settings.batch_size,
            seed=derive_seed(seed, "order"),
            shuffle=self._settings.shuffle,
            window_rows=self.config.data.window_rows,
            num_folds=folds,
        )
        fold = None if folds == 1 else lambda rows: reward_folds(rows, folds, seed)
        exchange = self.step.workers.exchange_of_readers()
        kept = round(self.config.data.cache_gib * 2**30) if self._settings.epochs > 1 else 0
        return self._data.batches(order, fold, exchange=exchange, cache_bytes=kept)

    def update(
        self, batch: Step, queue: StepMetricsQueue, key: StepKey, *, diagnose: bool = False
    ) -> StepDiagnostics | None:
        """Update the policy on one batch and queue its metrics."""
        proposal = self.step.proposal
        if proposal is not None:
            if proposal.due(key.step):
                finish_updates(self._optimizer)
            proposal.at_step(key.step)
        result, diagnostics = self.step.loss(batch, diagnose=diagnose, key=key)
        loss = self.step.total_loss(result.loss.detach())
        self._optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        self._gradients.combine()
        norm: Tensor | None = None
        if self._settings.gradient_clip is not None:
            norm = self._gradients.clip(self._settings.gradient_clip)
        epoch = batch.cursor.epoch + 1
        queue.add(key.step + 1, epoch, batch.batch_rows, loss, result.value, norm)
        self._optimizer.step()
        return diagnostics

    def _start(self, resume: bool) -> Progression:
        if resume and self._store is not None:
            progression = self._store.load_newest(self.policy, self._optimizer)
            if progression is not None:
                if self.step.proposal is not None:
                    self.step.proposal.load_state(self._store.extra)
                if self._average is not None:
                    self._average.load_state(self._store.extra)
                lines, epoch = progression.metrics_lines, progression.cursor.epoch
                self._metrics.resume_at(progression.step, epoch - progression.epoch_ends, lines)
                self._progress.note(f"continuing from the checkpoint of step {progression.step:,}")
                return progression
        if self._take_over is not None:
            self._take_over(self._optimizer)
        self._metrics.restart()
        return Progression(cursor=Cursor(epoch=0, window=0, batch=0))

    def _run_epoch(self, reader: BatchReader, progression: Progression) -> None:
        settings, seed = self._settings, self.config.seed
        epoch = progression.cursor.epoch
        sums = EpochSums.restore(progression.epoch_sums)
        before = seen = sums.rows
        rest = "rest of " if before else ""
        self._progress.start(
            f"{rest}epoch {epoch + 1} of {settings.epochs}", self._data.train.num_rows - int(before)
        )
        queue = StepMetricsQueue(sums)
        self._times.restart()
        due = Due(save=False, stop=False)
        self.policy.train()
        workers = self.step.workers
        num_windows = len(reader.order.windows(epoch))
        waited = reader.seconds_waiting
        began = time.monotonic()
        batch: Step | None = None
        for batch in reader.epoch(epoch, progression.cursor, workers.rank, workers.size):
            cursor = batch.cursor
            at = (epoch, cursor.window, cursor.batch)
            seed_torch(seed, "step", *at)
            self.policy.seed_draws(torch.initial_seed())
            every = settings.log_every_steps
            logged = every is not None and progression.step % every == 0
            progress = (epoch + seen / self._data.train.num_rows) / settings.epochs
            self._rate.at(progress)
            self._temperature.at(progress)
            key = StepKey(progression.step, derive_seed(seed, "draws", *at))
            diagnostics = self.update(batch, queue, key, diagnose=logged)
            if self._average is not None:
                self._average.after_step(progress)
            progression.cursor = cursor
            progression.step += 1
            progression.rows += batch.batch_rows
            seen += batch.batch_rows
            if logged:
                self._write_step(queue, progression, epoch, diagnostics)
            speed = (seen - before) / max(time.monotonic() - began, 1e-9)
            self._progress.advance(batch.batch_rows, self._note(progression.step, sums, speed))
            due = self._times.after_step()
            if (due.save or due.stop) and cursor.window < num_windows:
                queue.read()
                progression.epoch_sums = asdict(sums)
                self._save_now(progression, stop=due.stop)
        queue.read()
        sums.seconds += time.monotonic() - began
        sums.seconds_waiting += reader.seconds_waiting - waited
        finish_updates(self._optimizer)
        if batch is not None and settings.measure_terms:
            self.policy.eval()
            sums.last = asdict(self.step.diagnostics(batch, derive_seed(seed, "measures")))
        progression.epoch_sums = asdict(sums)
        progression.cursor = Cursor(epoch=epoch + 1, window=0, batch=0)
        self._progress.finish()
        if due.save or due.stop:
            self._save_now(progression, stop=due.stop)

    def _end_epoch(self, progression: Progression) -> None:
        """Validate, write the epoch's line and save."""
        self._temperature.at(progression.cursor.epoch / self._settings.epochs)
        if self._average is not None:
            self._average.swap_in()
        progression.finished = self._close_epoch(progression)
        if self._average is not None:
            self._average.swap_out()
        limit = self._interruption.ends_after(progression.cursor.epoch)
        self._save_now(progression, stop=self._times.after_step().stop or limit)

    def _note(self, step: int, sums: EpochSums, rows_per_second: float) -> str:
        size = self.step.workers.size
        return (
            f"step {step:,}, loss {sums.mean_loss:.4f}, {rows_per_second:,.0f} rows/s, "
            f"{size} worker{'' if size == 1 else 's'}"
        )

    def _write_step(
        self,
        queue: StepMetricsQueue,
        progression: Progression,
        epoch: int,
        diagnostics: StepDiagnostics | None,
    ) -> None:
        queue.read()
        assert queue.last is not None, "a step was queued"
        self._metrics.write(
            {
                "kind": "step",
                "step": progression.step,
                "epoch": epoch,
                "loss": queue.last.loss,
                "value_estimate": queue.last.value,
                "gradient_norm": queue.last.gradient_norm,
                **diagnostics_line(diagnostics),
            }
        )

    def _close_epoch(self, progression: Progression) -> bool:
        """Validate, keep the best weights, write the epoch's line; True if patience ran out."""
        epoch = progression.cursor.epoch - 1
        sums = EpochSums.restore(progression.epoch_sums)
        progression.epoch_sums = None
        line: dict[str, Any] = {
            "kind": "epoch",
            "step": progression.step,
            "epoch": epoch,
            "loss": sums.mean_loss,
            "value_estimate": sums.mean_value if self._estimates_value else None,
            **diagnostics_line(StepDiagnostics(**sums.last) if sums.last else None),
            "rows_per_second": sums.rows / sums.seconds if sums.seconds > 0 else None,
            "waiting_share": sums.seconds_waiting / sums.seconds if sums.seconds > 0 else None,
        }
        score: ValidationScore | None = None
        due = (epoch + 1) % self._settings.validate_every_epochs == 0
        if self._validate is not None and (due or epoch + 1 == self._settings.epochs):
            score = self._validate(self.policy)
            line["validation"] = asdict(score)
            self._keep_if_best(score, progression)
        if self._on_epoch_end is not None:
            self.policy.eval()
            with torch.no_grad():
                line.update(self._on_epoch_end(_on_cpu(self.policy), epoch))
        self._metrics.write(line)
        patience = self._settings.patience
        return (
            score is not None
            and patience is not None
            and progression.validations_without_gain >= patience
        )

    def _keep_if_best(self, score: ValidationScore, progression: Progression) -> None:
        if progression.best_score is not None and score.low <= progression.best_score:
            progression.validations_without_gain += 1
            return
        progression.best_score, progression.best_low = score.low, score.simultaneous_low
        progression.best_step = progression.step
        progression.validations_without_gain = 0
        if self._store is not None:
            self._store.save_best(self.policy, progression.step)
        else:
            self._best_in_memory = {
                name: tensor.clone() for name, tensor in self.policy.state_dict().items()
            }

    def _save(self, progression: Progression) -> None:
        if self._store is not None:
            extra = {} if self.step.proposal is None else dict(self.step.proposal.state())
            if self._average is not None:
                extra.update(self._average.state())
            progression.metrics_lines = len(self._metrics.lines)
            self._store.save(self.policy, self._optimizer, progression, extra)

    def _save_now(self, progression: Progression, *, stop: bool) -> None:
        """Begin a checkpoint, or write it and stop.

        Raises:
            StoppedError: `stop` is true, and training has more to do.
        """
        self._save(progression)
        self._times.restart()
        ended = progression.finished or progression.cursor.epoch == self._settings.epochs
        if not stop or (ended and not progression.epoch_ends):
            return
        if self._store is not None:
            self._store.finish()
        raise StoppedError(
            f"training stopped on request after step {progression.step:,}"
            + ("; --resume goes on from there" if self._store is not None else "")
        )

    @property
    def _estimates_value(self) -> bool:
        """Whether the objective reports an off-policy estimate of the policy's value."""
        requirements = self.step.objective.requirements
        return requirements.policy_terms and self._data.train.schema.pscore is not None

    def _load_best(self, progression: Progression) -> None:
        if progression.best_step is not None and progression.best_step != progression.step:
            if self._store is not None:
                self._store.load_best(self.policy, progression.best_step)
            elif self._best_in_memory is not None:
                self.policy.load_state_dict(self._best_in_memory)
        self._temperature.end()
        self.policy.eval()


def _on_cpu(policy: TwoTowerPolicy) -> TwoTowerPolicy:
    return policy if policy.device.type == "cpu" else copy.deepcopy(policy).cpu()


def _table_updates(settings: TrainingConfig, *, sampled: bool) -> TableUpdates:
    if settings.table_updates != "auto":
        return settings.table_updates
    return "lazy_adamw" if sampled and settings.optimizer == "adamw" else "dense"
