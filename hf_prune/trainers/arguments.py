"""Training arguments, for use in Python and with `HfArgumentParser`."""

import os
from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..errors import ConfigError, check_positive, check_whole, unknown
from ..search.spaces import known_spaces

STRATEGIES = ("standard", "random", "linear_random", "sandwich", "kd", "full")


@dataclass
class PruningTrainingArguments(TrainingArguments):  # type: ignore[misc]  # transformers is not type-checked here
    """Arguments of [`PruningTrainer`]: those of `TrainingArguments`, and

    Args:
        distillation_weight (`float`, *optional*, defaults to 0.0): Weight w of the distillation in the loss
            (1−w)·task + w·distillation.
        distillation_temperature (`float`, *optional*, defaults to 2.0): T in T²·KL(softmax(teacher/T) ‖
            softmax(student/T)).

    Raises:
        ConfigError: An option is out of range.
    """

    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight w of the distillation in the loss (1-w)*task + w*distillation."}
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Temperature at which the logits of teacher and student are compared."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_distillation()

    def check_distillation(self) -> None:
        """Raise unless the options of distillation are in range.

        Raises:
            ConfigError: One is not; it is named.
        """
        if not 0 <= self.distillation_weight <= 1:
            raise ConfigError(f"distillation_weight must be from 0 to 1, got {self.distillation_weight!r}.")
        check_positive(distillation_temperature=self.distillation_temperature)


@dataclass
class PassOptions:
    """Options of PASS.

    Args:
        num_heads (`int`): How many heads to keep, over all layers. Under grouped-query attention KV groups are
            counted.
        gate_learning_rate (`float`, *optional*): Learning rate of the gates. It follows the schedule of the weights'.
            Defaults to 0.5 as in the paper; in runs of less than 10,000 steps to 8 / `lambda_steps` if that is less:
            fast enough to decide the gates and no faster, for at 0.5 noise alone decides them in some fifty steps,
            long before the task has shown which heads it needs.
        train_weights (`bool`, *optional*, defaults to `True`): Train the weights together with the gates, or the gates
            alone.
        concentrate (`bool`, *optional*, defaults to `False`): Prefer to empty whole attention modules (PASSCONC).
        reopen (`bool`, *optional*): At three moments in the first half of the run open closed heads again, with a
            probability that grows with their confidence in the batches of that step. Defaults to `True` as in the
            paper, to `False` in runs of less than 10,000 steps, in which the gates don't settle again.
        lambda_base, lambda_growth (`float`, *optional*, defaults to 1e-5 and 1000): The weight of the penalty begins
            at `lambda_base` and grows by the factor `lambda_growth` in `lambda_steps` steps, until `num_heads` gates
            are open and all others closed. The values are for mean losses.
        lambda_steps (`int`, *optional*): See above. Clipping, reopening and concentration happen at 2 to 5 times as
            many steps; without reopening concentration begins at once as many, and its weight is chosen anew at each
            step, so that it empties one module after the other. Defaults to 1000 as in the paper, to a fifth of the
            run where that is less.

    Raises:
        ConfigError: An option is out of range.
    """

    num_heads: int | None = field(default=None, metadata={"help": "How many heads to keep, over all layers."})
    gate_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the gates. Default: 0.5, or 8 / lambda_steps in a run of less than 10,000 steps."
        },
    )
    train_weights: bool = field(
        default=True, metadata={"help": "Train the weights together with the gates, or the gates alone."}
    )
    concentrate: bool = field(default=False, metadata={"help": "Prefer to empty whole attention modules (PASSCONC)."})
    reopen: bool | None = field(
        default=None,
        metadata={"help": "Open confident heads again in the first half. Default: in runs of 10,000 steps or more."},
    )
    lambda_base: float = field(default=1e-5, metadata={"help": "Weight of the penalty at the begin."})
    lambda_growth: float = field(
        default=1000.0, metadata={"help": "Factor by which the weight of the penalty grows in lambda_steps."}
    )
    lambda_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps in which the weight of the penalty grows by lambda_growth. Default: 1000, or a fifth "
            "of the run if that is less."
        },
    )

    def __post_init__(self) -> None:
        self.check_pass_options()

    def check_pass_options(self) -> None:
        """Raise unless all options are in range.

        Raises:
            ConfigError: One is not, or `num_heads` is missing; it is named.
        """
        if self.num_heads is None:
            raise ConfigError("num_heads is missing: say how many heads to keep, over all layers.")
        for name in ("num_heads", "lambda_steps"):
            value = getattr(self, name)
            if value is not None:
                check_whole(1, **{name: value})
        for name in ("gate_learning_rate", "lambda_base", "lambda_growth"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        if self.lambda_growth <= 1:
            raise ConfigError(f"lambda_growth must be more than 1, got {self.lambda_growth!r}.")


@dataclass
class PassTrainingArguments(PassOptions, PruningTrainingArguments):
    """Arguments of [`PassTrainer`]: those of [`PruningTrainingArguments`] and [`PassOptions`].

    Raises:
        ConfigError: An option is out of range, or `num_heads` is missing.
    """

    def __post_init__(self) -> None:
        PruningTrainingArguments.__post_init__(self)
        self.check_pass_options()


@dataclass
class SuperNetTrainingArguments(PruningTrainingArguments):
    """Arguments of [`SuperNetTrainer`]: those of [`PruningTrainingArguments`], and

    Args:
        strategy (`str`, *optional*, defaults to `"full"`): What is trained in a step: `"standard"` the whole network;
            `"random"` sub-networks by chance; `"linear_random"` one or the other, sub-networks with a probability
            that grows from 0 to 1; `"sandwich"` the whole network, the smallest sub-network, and others by chance;
            `"kd"` as `"linear_random"`, with sub-networks that learn the logits of the whole network; `"full"` as
            `"sandwich"`, with sub-networks that learn its logits.
        search_space (`str`, *optional*, defaults to `"small"`): `"small"`, `"layer"`, `"medium"` or `"large"`.
        num_subnetworks (`int`, *optional*, defaults to 2): k, how many sub-networks are drawn in a step.
        temperature (`float`, *optional*, defaults to 10.0): T, at which sub-networks learn the logits.

    Raises:
        ConfigError: An option is unknown or out of range.
    """

    strategy: str = field(
        default="full",
        metadata={"help": f"What is trained in a step: {', '.join(STRATEGIES)}.", "choices": STRATEGIES},
    )
    search_space: str = field(
        default="small", metadata={"help": "Which sub-networks there are.", "choices": known_spaces()}
    )
    num_subnetworks: int = field(default=2, metadata={"help": "How many sub-networks are drawn in a step."})
    temperature: float = field(
        default=10.0, metadata={"help": "Temperature at which sub-networks learn the logits of the whole network."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in STRATEGIES:
            raise ConfigError(unknown("strategy", self.strategy, STRATEGIES))
        if self.search_space not in known_spaces():
            raise ConfigError(unknown("search space", self.search_space, known_spaces()))
        check_whole(1, num_subnetworks=self.num_subnetworks)
        check_positive(temperature=self.temperature)


@dataclass
class Seq2SeqPruningTrainingArguments(PruningTrainingArguments, Seq2SeqTrainingArguments):  # type: ignore[misc]
    """Arguments of [`Seq2SeqPruningTrainer`]: those of [`PruningTrainingArguments`] and `Seq2SeqTrainingArguments`."""


@dataclass
class Seq2SeqPassTrainingArguments(PassTrainingArguments, Seq2SeqTrainingArguments):  # type: ignore[misc]
    """Arguments of [`Seq2SeqPassTrainer`]: those of [`PassTrainingArguments`] and `Seq2SeqTrainingArguments`."""


@dataclass
class Seq2SeqSuperNetTrainingArguments(SuperNetTrainingArguments, Seq2SeqTrainingArguments):  # type: ignore[misc]
    """Arguments of [`Seq2SeqSuperNetTrainer`]: [`SuperNetTrainingArguments`] and `Seq2SeqTrainingArguments`."""


def check_whole_model(args: TrainingArguments) -> None:
    """Raise if the model will be sharded: gates, masks and the final cut need all of it in each process.

    Raises:
        ConfigError: FSDP or DeepSpeed is on.
    """
    launched = {name: os.environ.get(f"ACCELERATE_USE_{name.upper()}", "") for name in ("fsdp", "deepspeed")}
    for name, given in (("fsdp", args.fsdp), ("deepspeed", args.deepspeed)):
        if given or launched[name].lower() in ("1", "true"):
            raise ConfigError(
                f"{name} splits the model over processes, and it is pruned whole: leave {name} away and let torchrun "
                "or `accelerate launch --multi_gpu` train a copy in each process."
            )
