"""A transformers.Trainer that trains privately while a scope over it is open."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .._rerun import checking
from .._validate import bad, positive
from ..errors import ScopeError, SelfCheckError
from ..training.attributes import copied, put
from ..training.optimizer import PrivateOptimizer
from ..training.prepared import Prepared, plain_loader
from ..training.refused_clipping import let_clip
from ..training.scope import PrivateTraining
from .logical_batches import LogicalBatch, LogicalBatches
from .spending import NAME, Spending, write
from .stepped_optimizer import SteppedOptimizer
from .token_losses import TokenLosses
from .trainer_scope import TrainerScope, batch_of_one, refuse
from .trl_forward import PairedCollate, TRLForward, has_two_rows, is_paired, unpaired

# What trainers of TRL count on themselves while the loss is computed, which the runs of a check would add to.
_COUNTED = ("_metrics", "_total_train_tokens")


class PrivateTransformersTrainer(TrainerScope):
    """A scope over a ``transformers.Trainer``: ``with ... as scope: trainer.train()`` is private training.

    - A logical batch is drawn by Poisson sampling, of ``per_device_train_batch_size * gradient_accumulation_steps`` examples
      expected; parts of at most ``per_device_train_batch_size`` are run at a time.
    - ``training_step`` takes the whole private step; the trainer's own ``optimizer.step()`` only acknowledges it. The train
      function, ``compute_loss`` included, is covered by the self-check, as under ``@dp_step``.
    - Losses over tokens (labels ``[n, t]``) are means over each example's own tokens, so that no example counts for another's:
      the trainer's usual mean over all tokens of a batch couples examples. With ``tokens_per_example`` an example's loss is the
      sum over its tokens divided by that number instead.
    - ``target_epsilon`` needs no ``epochs``: the budget is for the steps that the trainer's arguments ask for (``max_steps``,
      ``num_train_epochs``).
    - Epsilon is in the trainer's logs. The loss in there, and evaluation on private data, are not private.

    The trainer's own ``max_grad_norm``, 1.0 by default, is applied to gradients that have been used already: it means nothing here.
    """

    def __init__(self, trainer: Any, *, tokens_per_example: float | None = None, **options: Any) -> None:
        """Keep the arguments; see :func:`~dp_hooks.integrations.private_trainer`.

        Args:
            trainer: the trainer.
            tokens_per_example: what an example's sum of token losses is divided by; None: the number of its tokens.
            options: those of :func:`dp_hooks.private_training`.
        """
        super().__init__(trainer, options)
        self._tokens = None if tokens_per_example is None else positive("tokens_per_example", tokens_per_example)
        self._losses: list[Tensor] = []
        self._spending = Spending("resume_from_checkpoint")
        self._operations = 0.0  # floating point operations of the parts since the trainer asked

    # ---------------------------------------------------------------- lifetime

    def __enter__(self) -> PrivateTraining:
        """Make the trainer private, and return the scope; if anything fails, everything is taken back."""
        trainer = self._trainer
        _check(trainer)
        self._paired = is_paired(trainer)
        self._is_trl = any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)
        with ExitStack() as stack:
            prepared = trainer.get_train_dataloader()
            put(stack, trainer, optimizer=Prepared(trainer.optimizer, prepared).optimizer)
            optimizer = trainer.create_optimizer()
            whole = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
            one = batch_of_one(prepared.collate_fn, prepared.dataset)
            self._doubled = self._paired and has_two_rows(one)
            paired = PairedCollate(prepared.collate_fn) if self._doubled else None
            loader = plain_loader(prepared, whole, collate_fn=paired)
            self._token_losses = TokenLosses.of(trainer, one, self._options, self._tokens)
            scope = PrivateTraining(trainer.model, optimizer, loader, **self._completed(loader))
            scope.averages = scope.averages or self._token_losses is not None
            private, batches = stack.enter_context(scope)
            own = (
                "training_step",
                "floating_point_ops",
                "log",
                "_save_checkpoint",
                "_load_optimizer_and_scheduler",
                "_get_output_dir",
            )
            self._original = {name: getattr(trainer, name) for name in own}
            self._scope, self._private = scope, private
            self._stepped = SteppedOptimizer(private)
            view = LogicalBatches(batches, private, scope.plan.batches_per_pass)
            put(
                stack,
                trainer,
                optimizer=self._stepped,
                get_train_dataloader=lambda: view,
                training_step=self._training_step,
                floating_point_ops=self._floating_point_ops,
                log=self._log,
                _save_checkpoint=self._save_checkpoint,
                _load_optimizer_and_scheduler=self._load_optimizer_and_scheduler,
            )
            private.attach_step_hook(self._keep)
            put(stack, trainer.args, gradient_accumulation_steps=1, ignore_data_skip=True)
            put(stack, trainer.accelerator, backward=self._caught)
            let_clip(trainer.accelerator, stack)
            handler = trainer.callback_handler
            put(stack, handler, optimizer=handler.optimizer, train_dataloader=handler.train_dataloader)
            stack.callback(self._forget)
            print(self._summary(whole))
            self._stack = stack.pop_all()
        return scope

    def _forget(self) -> None:
        """Take the private optimizer out of what accelerate keeps."""
        known = self._trainer.accelerator._optimizers
        known[:] = [held for held in known if getattr(held, "optimizer", None) is not self._stepped]

    def _completed(self, loader: DataLoader[Any]) -> dict[str, Any]:
        """The options of the scope, with what follows from the trainer's arguments."""
        args, options = self._trainer.args, dict(self._options)
        options.setdefault("max_physical_batch_size", args.per_device_train_batch_size)
        options.setdefault("grad_scaler", self._trainer.accelerator.scaler)
        if self._token_losses is not None:
            options["loss_reduction"] = "sum"
        if options.get("target_epsilon") is not None and options.get("epochs") is None:
            if options.get("privacy_unit") is not None and args.max_steps > 0:
                what = f"with privacy_unit= a pass is over units, and max_steps={args.max_steps} is no known number of them. "
                raise bad("epochs", None, what + "Pass epochs= to private_trainer(), or set num_train_epochs.")
            steps = len(loader) if options.get("sample_rate") is None else math.ceil(1 / options["sample_rate"] - 1e-9)
            options["epochs"] = args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs
        return options

    def _summary(self, whole: int) -> str:
        scope, args = self._scope, self._trainer.args
        accumulated = f"{args.per_device_train_batch_size} x {whole // args.per_device_train_batch_size} accumulated"
        return (
            f"dp_hooks: logical batches of {scope.plan.expected_batch_size:g} examples expected ({accumulated}) of "
            f"{scope.plan.examples}; sigma = {scope.noise_multiplier:.4g}"
            + ("" if scope.target_delta is None else f", delta = {scope.target_delta:g}")
        )

    # ---------------------------------------------------------------- what the trainer calls

    def _training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take one private step."""
        with self._explained():
            return self._step_on(model, inputs, "Let trainer.train() fetch its batches by get_train_dataloader().")

    def _before(self, part: Any, size: int) -> tuple[int, int]:
        self._count_operations(part)
        if self._token_losses is None:
            return super()._before(part, size)
        tokens = self._token_losses.count(part)
        self._private.weigh_rows(self._token_losses.weights(tokens).to(self._private.params[0].device))
        return int(tokens.sum()), 1

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in an error of the self-check what the trainer was asked for."""
        try:
            yield
        except SelfCheckError as error:
            if self._token_losses is None:
                raise
            raise SelfCheckError(
                f"{error}\n(Labels are those of single tokens, so the trainer was asked for the sum over all tokens, by "
                "num_items_in_batch=1. If compute_loss returns the mean of one loss for each example, pass "
                'loss_reduction="mean" to private_trainer.)'
            ) from error

    def _loss(self, model: nn.Module, part: Any) -> Tensor:
        """The loss of one part, by the trainer's own training step, which hands it over where it would go back from it."""
        trainer = self._trainer
        self._losses.clear()
        with ExitStack() as stack:
            if checking():
                put(stack, trainer, **{name: copied(vars(trainer)[name]) for name in _COUNTED if name in vars(trainer)})
            items = None
            if self._token_losses is not None:
                part, items = self._token_losses.prepare(stack, part)
            if self._is_trl:
                model = TRLForward(model, paired=self._paired)  # type: ignore[assignment]
            self._original["training_step"](model, unpaired(part) if self._doubled else part, items)
        if len(self._losses) != 1:
            raise ScopeError(
                f"training_step() of {type(trainer).__name__} went back from {len(self._losses)} losses; a private step needs one: "
                "accelerator.backward(loss), once."
            )
        return self._losses.pop()

    def _caught(self, loss: Tensor, **kwargs: Any) -> None:
        self._losses.append(loss)

    def _count_operations(self, part: Any) -> None:
        self._operations += float(self._original["floating_point_ops"](part))
        track = getattr(type(self._trainer), "_track_num_input_tokens", None)
        if track is not None:
            track(self._trainer, part)

    def _floating_point_ops(self, inputs: Any) -> float:
        """Those of the parts of a logical batch, which were counted as they came."""
        if not isinstance(inputs, LogicalBatch):
            return float(self._original["floating_point_ops"](inputs))
        counted, self._operations = self._operations, 0.0
        return counted

    # ---------------------------------------------------------------- what was spent, on disk

    def _keep(self, optimizer: PrivateOptimizer) -> None:
        """Before the parameters move: what has been spent now."""
        self._spending.keep(self._folder, self._scope.state_dict())

    @property
    def _folder(self) -> Path:
        return Path(self._original["_get_output_dir"](None))

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(self._original["_get_output_dir"](trial)) / f"checkpoint-{self._trainer.state.global_step}"
        write(folder, self._scope.state_dict())  # first: weights are never there without what they have cost
        self._original["_save_checkpoint"](model, trial, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The trainer goes on from a checkpoint: so does the scope, with all that was spent up to the last step of that run."""
        if checkpoint is not None:
            folder = Path(checkpoint)
            state = self._spending.read(folder)
            if state is None:
                raise bad(
                    "resume_from_checkpoint",
                    checkpoint,
                    f"it has no {NAME}, so what its run has spent is not known. Go on from a checkpoint that was saved in a "
                    "private scope; to begin with these weights, load them into the model, and start a new run.",
                )
            self._scope.resume(self._spending.latest(state, folder.parent, [self._folder]))
        self._original["_load_optimizer_and_scheduler"](checkpoint)

    def _log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs["epsilon"] = self._scope.report().epsilon
        self._original["log"](logs, *args, **kwargs)


def _check(trainer: Any) -> None:
    args = trainer.args
    by_length = getattr(args, "group_by_length", False) or getattr(args, "train_sampling_strategy", "") == "group_by_length"
    reasons = {
        "its model is made anew by model_init in every train(). Pass model=... instead": trainer.model_init is not None,
        "several GPUs would run it in DataParallel. Let it see one (CUDA_VISIBLE_DEVICES=0)": args.n_gpu > 1,
        "auto_find_batch_size=True changes the batch size, which the accounting is for": args.auto_find_batch_size,
        "DeepSpeed and FSDP are not supported in this version": trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
        "batches of examples that are alike in length tell their lengths, and Poisson sampling draws others. Set "
        'train_sampling_strategy="random" (group_by_length=False)': by_length,
        "it has no train_dataset": trainer.train_dataset is None,
        "its train_dataset is an IterableDataset, from which no example can be drawn independently. Use one with __getitem__, or "
        "store the stream in one first": isinstance(trainer.train_dataset, IterableDataset),
        "its train_dataset is empty": isinstance(trainer.train_dataset, Sized) and not len(trainer.train_dataset),
    }
    refuse(trainer, "trainer", reasons)
    if getattr(args, "packing", False):
        warnings.warn(
            "packing joins texts to rows before the scope sees them: what is protected is a row, and a text that is in two rows, "
            "or moves others, counts more than once. Set packing=False to protect texts",
            stacklevel=3,
        )
    choosing = [type(c).__name__ for c in trainer.callback_handler.callbacks if type(c).__name__ == "EarlyStoppingCallback"]
    choosing += ["load_best_model_at_end"] if args.load_best_model_at_end else []
    if choosing:
        warnings.warn(
            f"{', '.join(choosing)}: to choose by evaluation on private data is not covered by the stated epsilon; it is if the "
            "evaluation data are public",
            stacklevel=3,
        )
