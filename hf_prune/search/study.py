"""Sub-networks and their errors in an Optuna study, that several processes share and a later one goes on with."""

import os
import random
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from transformers.utils import logging

from ..errors import ConfigError, unknown
from .base import Member, SearchSpace

logger = logging.get_logger(__name__)

_POPULATION = 10  # of NSGA-II, as in Klein et al. 2024
# Numbers in a member beyond which an Optuna sampler would compute, or a database write, for seconds a member.
_MOST = {"nsga2": 1000, "tpe": 1000, "gp": 100}
METHODS = ("random", "local", *_MOST)


@dataclass(frozen=True)
class Sample:
    """A sub-network to evaluate. `error`: where it has been evaluated before."""

    number: int
    member: Member
    error: float | None


class SearchStudy:
    """Asks Optuna for members of a space, and tells it how good they are.

    Every trial carries its member, and once it is finished what is known of it, in its user attributes. The largest,
    the smallest and the middle member come first.

    Args:
        space ([`SearchSpace`]): The space.
        identity (`dict[str, Any]`): What must be the same whenever the study is opened, by name. JSON-serialisable.
        method (`str`): One of `METHODS`.
        seed (`int`): The n-th member depends on it and on what came before, whether that was in this process or not.
        storage (`str`, path or `BaseStorage`, *optional*): An URL of a database, or the path of a journal. In memory
            by default.
        name (`str`): Of the study in the storage.
        pruner (`BasePruner`, *optional*): Decides after each report whether an evaluation is worth going on. Optuna's
            pruners know one objective only: with one, it is the sum of error and cost.

    Raises:
        ConfigError: The method is unknown, or not for spaces as large as this; the storage can't be opened, or has a
            study of that name with another identity.
    """

    def __init__(
        self,
        space: SearchSpace,
        identity: Mapping[str, Any],
        *,
        method: str,
        seed: int,
        storage: str | os.PathLike[str] | BaseStorage | None,
        name: str,
        pruner: BasePruner | None = None,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(unknown("search method", method, METHODS))
        count, most = len(space.parameters), _MOST.get(method, len(space.parameters))
        if count > most:
            raise ConfigError(
                f"{method!r} is for spaces of at most {most} parameters, this one has {count:,}: search with 'random' "
                "or 'local', or in a smaller space."
            )
        self.space, self.method, self.seed = space, method, seed
        self._trials: dict[int, optuna.Trial] = {}  # asked for, and not told yet
        self._objectives = 2 if pruner is None else 1
        # Members of large spaces stay one piece, else a database would write for a minute.
        separate = count <= max(_MOST.values())
        self._distributions: dict[str, BaseDistribution] = {
            key: IntDistribution(values[0], values[-1]) for key, values in space.parameters.items() if separate
        }
        try:
            self._study = optuna.create_study(
                storage=_storage(storage),
                study_name=name,
                directions=["minimize"] * self._objectives,
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:  # databases raise anything
            raise ConfigError(
                f"Can't open the storage {storage!r}: {error}. Give an URL such as 'sqlite:///search.db', or the path "
                "of a journal such as 'search.log'."
            ) from error
        self._check(identity, f"The study {name!r} in {storage!r}")
        self._restore()

    def _check(self, identity: Mapping[str, Any], which: str) -> None:
        known = self._study.user_attrs.get("hf_prune")
        if known is None:
            if self._study.get_trials(deepcopy=False) or len(self._study.directions) != self._objectives:
                raise ConfigError(f"{which} is no search of hf_prune: give another study_name.")
            self._study.set_user_attr("hf_prune", dict(identity))
            return
        for key, value in identity.items():
            if known.get(key) != value:
                raise ConfigError(
                    f"{which} was begun with another {key}: {known.get(key)}, now it is {value}. Give it the same "
                    f"{key} again, or begin another study with study_name=."
                )

    def _restore(self) -> None:
        """Give the members of killed workers back, and see to it that the search begins as it should."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            host, _, process = trial.user_attrs.get("worker", "").partition(":")
            if host == socket.gethostname() and not psutil.pid_exists(int(process)):
                logger.warning("The worker of trial %d is gone: its sub-network comes again.", trial.number)
                self._study.tell(trial.number, state=TrialState.FAIL)
                self._enqueue(self._member(trial))
        seen = {tuple(t.user_attrs.get("member", ())) for t in self._study.get_trials(deepcopy=False)}
        for member in (self.space.largest, self.space.smallest, self.space.middle):
            if tuple(member.values()) not in seen:
                seen.add(tuple(member.values()))
                self._enqueue(member)

    def _enqueue(self, member: Member) -> None:
        params = member if self._distributions else {}
        self._study.enqueue_trial(params, user_attrs={"member": list(member.values())})

    # Ask and tell

    def __len__(self) -> int:
        """How many members are done with: evaluated, given up early, or found to have no finite error."""
        trials = self._study.get_trials(deepcopy=False)
        done = (TrialState.COMPLETE, TrialState.PRUNED)
        return sum(trial.state in done or "reason" in trial.user_attrs for trial in trials)

    def ask(self) -> Sample:
        """The next member to evaluate."""
        trials = self._study.get_trials(deepcopy=False)
        # What was broken off comes again, and does not count.
        counted = sum(t.state != TrialState.FAIL or "reason" in t.user_attrs for t in trials)
        sampler = self._study.sampler = self._sampler(counted)
        trial = self._study.ask(self._distributions)
        self._trials[trial.number] = trial
        if "member" not in trial.user_attrs:
            drawn: Member = trial.params
            if not drawn:
                assert isinstance(sampler, _MemberSampler)
                drawn = sampler.draw(self._study)
            trial.set_user_attr("member", list(self.space.fit(drawn).values()))
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")  # last: with it the member comes again
        values = trial.user_attrs["member"]
        done = (t for t in trials if t.state == TrialState.COMPLETE and t.user_attrs["member"] == values)
        known = (t.user_attrs["error"] for t in done)
        return Sample(trial.number, self._member(trial), next(known, None))

    def tell(self, sample: Sample, error: float, cost: float) -> None:
        """How good a member is."""
        trial = self._trials.pop(sample.number)
        trial.set_user_attr("error", error)
        self._study.tell(trial, self._values(error, cost))

    def _values(self, error: float, cost: float) -> list[float]:
        return [error, cost] if self._objectives == 2 else [error + cost]

    def report(self, sample: Sample, step: int, error: float, cost: float) -> bool:
        """How good a member is so far. Whether it is worth going on."""
        trial = self._trials[sample.number]
        trial.report(self._values(error, cost)[0], step)
        return not trial.should_prune()

    def stop(self, sample: Sample) -> None:
        """A member was given up early."""
        self._study.tell(self._trials.pop(sample.number), state=TrialState.PRUNED)

    def fail(self, sample: Sample, reason: str | None) -> None:
        """A member has no finite error, for a reason; without one it was broken off, and comes again."""
        if reason is not None:
            self._trials[sample.number].set_user_attr("reason", reason)
        self._study.tell(self._trials.pop(sample.number), state=TrialState.FAIL)
        if reason is None:
            self._enqueue(sample.member)

    def evaluated(self) -> list[tuple[Member, float]]:
        """The members that were evaluated, each once, with their errors."""
        found: dict[tuple[int, ...], tuple[Member, float]] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            found.setdefault(tuple(trial.user_attrs["member"]), (self._member(trial), trial.user_attrs["error"]))
        return list(found.values())

    def _member(self, trial: FrozenTrial | optuna.Trial) -> Member:
        return dict(zip(self.space.parameters, trial.user_attrs["member"], strict=True))

    def _sampler(self, count: int) -> BaseSampler:
        """For the next trial. A new one for each, so that a search which goes on draws as if it never ended."""
        seed = (self.seed * 1_000_003 + count) % 2**32
        if self.method == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
        if self.method == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        if self.method == "gp":
            return optuna.samplers.GPSampler(seed=seed, deterministic_objective=True, warn_independent_sampling=False)
        return _MemberSampler(self.space, seed, local=self.method == "local")


class _MemberSampler(BaseSampler):
    """Random search, and the local search of Klein et al. 2024: a random point of the front, one number changed."""

    def __init__(self, space: SearchSpace, seed: int, local: bool) -> None:
        self.space, self.random, self.local = space, random.Random(seed), local

    def draw(self, study: optuna.Study) -> Member:
        parameters = self.space.parameters
        front = study.best_trials if self.local else []
        if not front:
            return {name: self.random.choice(values) for name, values in parameters.items()}
        member = dict(zip(parameters, self.random.choice(front).user_attrs["member"], strict=True))
        name = self.random.choice([name for name, values in parameters.items() if len(values) > 1])
        member[name] = self.random.choice([value for value in parameters[name] if value != member[name]])
        return member

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: IntDistribution(v[0], v[-1]) for name, v in self.space.parameters.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.draw(study) if search_space else {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.random.choice(self.space.parameters[param_name])


def _storage(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage | None:
    if storage is None or isinstance(storage, BaseStorage):
        return storage
    if isinstance(storage, str) and "://" in storage:
        # Another worker that is writing is waited for.
        wait = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
        return RDBStorage(storage, engine_kwargs=wait)
    path = Path(storage).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna reports every trial, which the progress bar does already, and warns of options that may change."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
