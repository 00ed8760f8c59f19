"""A trial that is worse than the others ends before its time."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    import optuna


class PruningCallback(TrainerCallback):
    """Reports each validation to a trial, and raises `optuna.TrialPruned` where its pruner gives the trial up.

    metric: of the validations, by the name that they have without "eval_"
    """

    def __init__(self, trial: "optuna.Trial", metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.reported = set[int]()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A process may have been killed after the report, and before it carried out what followed from that.
        self.reported = set(self.trial.study.get_trials(deepcopy=False)[self.trial.number].intermediate_values)
        if state.global_step in self.reported:
            self._prune(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        value = (metrics or {}).get(f"eval_{self.metric}")
        # A training that goes on from a checkpoint, or goes back to one, comes to the same step again.
        if value is None or state.global_step in self.reported:
            return
        self.trial.report(value, state.global_step)
        self.reported.add(state.global_step)
        if state.global_step < state.max_steps:  # the last validation saves no time any more
            self._prune(state.global_step)

    def _prune(self, step: int) -> None:
        import optuna

        if self.trial.should_prune():
            raise optuna.TrialPruned(f"pruned at step {step}")
