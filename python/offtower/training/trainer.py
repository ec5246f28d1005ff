"""The loop: batches in the seeded order, one optimiser, validation, checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offtower.config import Config, TrainingConfig
from offtower.data.order import Cursor, EpochOrder
from offtower.data.reader import BatchReader, Step
from offtower.metrics import MetricsLog
from offtower.models.optimizer import TableUpdates, finish_updates, make_optimizer
from offtower.models.policy import TwoTowerPolicy
from offtower.models.reward.base import RewardModel
from offtower.models.reward.fit import reward_folds
from offtower.objectives import Objective
from offtower.prepare import PreparedData
from offtower.progress import Progress
from offtower.sampling import Proposal
from offtower.seeds import derive_seed, seed_torch
from offtower.training.checkpoints import CheckpointStore, Progression
from offtower.training.distributed import ALONE, Workers
from offtower.training.distributed.gradients import GradientSum
from offtower.training.epoch import EpochSums, measures_line
from offtower.training.readings import Readings
from offtower.training.schedule import LearningRate, Temperature, WeightAverage
from offtower.training.step import StepLoss, StepMeasures, StepPlace
from offtower.training.validation import ValidationScore, Validator

EpochHook = Callable[[TwoTowerPolicy, int], dict[str, float]]
"""Called after each epoch with the policy on the CPU; what it returns goes into the metrics, and
nowhere else."""


@dataclass(frozen=True)
class TrainingResult:
    """What the loop ended with; the policy that was passed in holds the selected weights."""

    epochs: int
    steps: int
    selected_step: int
    """Step whose weights the policy has: the best validation's, else the last."""
    validation: float | None
    """Lower bound of the validation estimate at `selected_step`."""
    stopped_early: bool
    history: list[dict[str, Any]]
    chosen: str | None = None
    """Candidate that objective=auto chose; `validation` is then of held-out training rows."""


class Trainer:
    """Trains one policy, on this process or on several that do the same in step.

    Args:
        config: the run's.
        data: opened logs and encodings.
        policy: trained in place.
        objective: what is maximised.
        step: the objective's loss on a batch.
        reward_model: frozen q(x, a), for objectives that need it.
        store: where checkpoints go; None trains in memory only.
        metrics: where metrics lines go; of the first worker.
        validate: score on the validation log; None keeps the last epoch's weights.
        proposal: of the sampled softmax; None takes exact terms.
        on_epoch_end: extra numbers for the metrics, such as a simulator's truth.
        workers: those that share every batch.
        owned: weights of which each worker has rows of its own.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        policy: TwoTowerPolicy,
        objective: Objective,
        step: StepLoss,
        reward_model: RewardModel | None,
        *,
        store: CheckpointStore | None = None,
        metrics: MetricsLog | None = None,
        validate: Validator | None = None,
        progress: Progress | None = None,
        on_epoch_end: EpochHook | None = None,
        proposal: Proposal | None = None,
        workers: Workers = ALONE,
        owned: Sequence[nn.Parameter] = (),
    ) -> None:
        self.config = config
        self.policy = policy
        self._data = data
        self._settings = config.training
        self._objective = objective
        self._reward_model = reward_model if objective.needs_reward_model else None
        self._step = step
        self._store = store
        self._metrics = metrics or MetricsLog(None)
        self._validate = validate
        self._progress = progress or Progress()
        self._on_epoch_end = on_epoch_end
        self._proposal = proposal
        self._workers = workers
        self._gradients = GradientSum(policy, workers, owned)
        self._optimizer = make_optimizer(
            self._settings.optimizer,
            policy,
            self._settings.learning_rate,
            self._settings.weight_decay,
            _table_updates(self._settings, sampled=proposal is not None),
            self._settings.table_learning_rate,
        )
        self._rate = LearningRate(self._settings, self._optimizer)
        self._temperature = Temperature(self._settings, policy)
        self._average = (
            None
            if self._settings.weight_average is None
            else WeightAverage(policy, self._settings.weight_average)
        )
        self._best_in_memory: dict[str, Tensor] | None = None

    def fit(self, *, resume: bool = False) -> TrainingResult:
        """Run to the last epoch or to an early stop, from the newest checkpoint if `resume`."""
        progression = self._start(resume)
        with self._reader() as reader:
            while progression.cursor.epoch < self._settings.epochs and not progression.finished:
                self._run_epoch(reader, progression)
                if self._average is not None:
                    self._average.swap_in()
                progression.finished = self._close_epoch(progression)
                if self._average is not None:
                    self._average.swap_out()
                self._save(progression)
        if self._average is not None:
            self._average.swap_in()
        if self._proposal is not None:
            self._proposal.close()
        if self._store is not None:
            self._store.finish()
        self._take_best(progression)
        return TrainingResult(
            epochs=progression.cursor.epoch,
            steps=progression.step,
            selected_step=progression.best_step or progression.step,
            validation=progression.best_score,
            stopped_early=progression.cursor.epoch < self._settings.epochs,
            history=self._metrics.epochs(),
        )

    def _start(self, resume: bool) -> Progression:
        if resume and self._store is not None:
            progression = self._store.load_newest(self.policy, self._optimizer)
            if progression is not None:
                if self._proposal is not None:
                    self._proposal.load_state(self._store.extra)
                if self._average is not None:
                    self._average.load_state(self._store.extra)
                self._metrics.resume_at(progression.step, progression.cursor.epoch)
                return progression
        self._metrics.restart()
        return Progression(cursor=Cursor(epoch=0, window=0, batch=0))

    def _reader(self) -> BatchReader:
        folds = 1 if self._reward_model is None else self._reward_model.num_folds
        seed = self.config.seed
        order = EpochOrder(
            self._data.train.row_group_sizes,
            self._settings.batch_size,
            seed=derive_seed(seed, "order"),
            shuffle=self._settings.shuffle,
            window_rows=self.config.data.window_rows,
            num_folds=folds,
        )
        return BatchReader(
            self._data.train,
            self._data.catalogue,
            self._data.context_encoding,
            order,
            fold=None if folds == 1 else lambda rows: reward_folds(rows, folds, seed),
            on_bad_rows=self._data.on_bad_rows,
            quarantine=self._data.quarantine_of("train"),
        )

    def _run_epoch(self, reader: BatchReader, progression: Progression) -> None:
        settings = self._settings
        epoch = progression.cursor.epoch
        sums = EpochSums.restore(progression.epoch_sums)
        self._progress.start(f"epoch {epoch + 1} of {settings.epochs}", self._data.train.num_rows)
        self._progress.advance(int(sums.rows))
        seen = sums.rows
        readings = Readings(sums)
        last_checkpoint = time.monotonic()
        self.policy.train()
        batches = reader.epoch(epoch, progression.cursor, self._workers.rank, self._workers.size)
        num_windows = len(reader.order.windows(epoch))
        waited = reader.seconds_waiting
        began = time.monotonic()
        batch: Step | None = None
        for batch in batches:
            cursor = batch.cursor
            seed_torch(self.config.seed, "step", epoch, cursor.window, cursor.batch)
            self.policy.seed_draws(torch.initial_seed())
            measure = progression.step % settings.log_every_steps == 0
            draw_seed = derive_seed(self.config.seed, "draws", epoch, cursor.window, cursor.batch)
            place = StepPlace(progression.step, draw_seed)
            over = (epoch + seen / self._data.train.num_rows) / settings.epochs
            self._rate.at(over)
            self._temperature.at(over)
            measures = self._update(batch, measure, readings, place)
            if self._average is not None:
                self._average.after_step(over)
            progression.cursor = cursor
            progression.step += 1
            progression.rows += batch.batch_rows
            seen += batch.batch_rows
            if measure:
                readings.read()
                assert readings.last is not None, "a step was read just now"
                self._metrics.write(
                    {
                        "kind": "step",
                        "step": progression.step,
                        "epoch": epoch,
                        "loss": readings.last.loss,
                        "value_estimate": readings.last.value,
                        "gradient_norm": readings.last.gradient_norm,
                        **measures_line(measures),
                    }
                )
            self._progress.advance(batch.batch_rows, f"objective {sums.mean_value:.4f}")
            due = time.monotonic() - last_checkpoint > settings.checkpoint_every_seconds
            # The end of the epoch writes its own, after the epoch was measured and judged.
            if self._checkpoint_due(due) and cursor.window < num_windows:
                readings.read()
                progression.epoch_sums = asdict(sums)
                self._save(progression)
                last_checkpoint = time.monotonic()
        readings.read()
        sums.seconds += time.monotonic() - began
        sums.seconds_waiting += reader.seconds_waiting - waited
        finish_updates(self._optimizer)
        if batch is not None and settings.measure_terms:
            self.policy.eval()
            seed = derive_seed(self.config.seed, "measures")
            sums.last = asdict(self._step.measures(batch, seed))
        progression.epoch_sums = asdict(sums)
        progression.cursor = Cursor(epoch=epoch + 1, window=0, batch=0)
        self._progress.finish()

    def _checkpoint_due(self, due: bool) -> bool:
        """Whether to begin a checkpoint, as the first worker's clock says; one that all workers
        have written takes its name."""
        if self._store is None:
            return False
        if self._workers.size == 1:
            return due
        told = torch.tensor(
            [due and self._workers.first, self._store.written], dtype=torch.float32, device="cpu"
        )
        begin, written = self._workers.sum(told).tolist()
        if written == self._workers.size:
            self._store.finish()
        return begin > 0

    def _update(
        self, batch: Step, measure: bool, readings: Readings, place: StepPlace
    ) -> StepMeasures | None:
        if self._proposal is not None:
            if self._proposal.due(place.step):
                finish_updates(self._optimizer)
            self._proposal.at_step(place.step)
        result, measures = self._step.loss(batch, measure=measure, place=place)
        loss = self._step.whole(result.loss.detach())
        self._optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        self._gradients.combine()
        norm: Tensor | None = None
        if self._settings.gradient_clip is not None:
            norm = self._gradients.clip(self._settings.gradient_clip)
        epoch = batch.cursor.epoch + 1
        readings.add(place.step + 1, epoch, batch.batch_rows, loss, result.value, norm)
        self._optimizer.step()
        return measures

    def _close_epoch(self, progression: Progression) -> bool:
        """Validate, keep the best, write the epoch's line; True when patience ran out."""
        epoch = progression.cursor.epoch - 1
        sums = EpochSums.restore(progression.epoch_sums)
        progression.epoch_sums = None
        line: dict[str, Any] = {
            "kind": "epoch",
            "step": progression.step,
            "epoch": epoch,
            "loss": sums.loss / max(sums.rows, 1),
            "value_estimate": sums.mean_value if self._estimates_value else None,
            **measures_line(StepMeasures(**sums.last) if sums.last else None),
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
                line.update(self._on_epoch_end(on_cpu(self.policy), epoch))
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
        progression.best_score = score.low
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
            extra = {} if self._proposal is None else dict(self._proposal.state())
            if self._average is not None:
                extra.update(self._average.state())
            self._store.save(self.policy, self._optimizer, progression, extra)

    @property
    def _estimates_value(self) -> bool:
        """Whether the objective's value is an off-policy estimate of the policy's."""
        return self._objective.uses_policy and self._data.train.schema.pscore is not None

    def _take_best(self, progression: Progression) -> None:
        if progression.best_step is not None and progression.best_step != progression.step:
            if self._store is not None:
                self._store.load_best(self.policy, progression.best_step)
            elif self._best_in_memory is not None:
                self.policy.load_state_dict(self._best_in_memory)
        self._temperature.end()
        self.policy.eval()


def on_cpu(policy: TwoTowerPolicy) -> TwoTowerPolicy:
    """The policy for those who know nothing of devices; a copy where it is on a GPU."""
    return policy if policy.device.type == "cpu" else copy.deepcopy(policy).cpu()


def _table_updates(settings: TrainingConfig, *, sampled: bool) -> TableUpdates:
    if settings.table_updates != "auto":
        return settings.table_updates
    return "lazy_adamw" if sampled and settings.optimizer == "adamw" else "dense"
