"""Sub-networks and their errors in an Optuna study, that several processes share and a later one goes on with."""

import hashlib
import os
import random
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from transformers.utils import logging

from ..batches import update_digest
from ..errors import ConfigError, unknown
from .base import Member, SearchSpace

logger = logging.get_logger(__name__)

_POPULATION = 10  # of NSGA-II, as in Klein et al. 2024
# Numbers in a member beyond which an Optuna sampler would compute, or a database write, for seconds a member.
_MOST = {"nsga2": 1000, "tpe": 1000, "gp": 100}
METHODS = ("random", "local", *_MOST)
_ATTEMPTS = 5  # to open a storage
_MARKED = timedelta(minutes=1)  # after which a trial that is asked for surely has its worker's mark


def check_method(method: str, space: SearchSpace) -> None:
    """Raise unless a method can search a space.

    Args:
        method (`str`): One of `METHODS`.
        space ([`SearchSpace`]): The space.

    Raises:
        ConfigError: The method is unknown, or not for spaces as large as this.
    """
    if method not in METHODS:
        raise ConfigError(unknown("search method", method, METHODS))
    count = len(space.parameters)
    if count > (most := _MOST.get(method, count)):
        raise ConfigError(
            f"{method!r} is for spaces of at most {most} parameters, this one has {count:,}: search with 'random' "
            "or 'local', or in a smaller space."
        )


@dataclass(frozen=True)
class Sample:
    """A sub-network to evaluate.

    Args:
        number (`int`): Of its trial in the study.
        member (`dict[str, int]`): Its numbers in the search space.
        error (`float`, *optional*): Where the same mask has been evaluated before.
    """

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
        check_method(method, space)
        self.space, self.method, self.seed = space, method, seed
        self._trials: dict[int, optuna.Trial] = {}  # asked for, and not told yet
        self._keys: dict[tuple[int, ...], bytes] = {}
        self._objectives = 2 if pruner is None else 1
        # Members of large spaces stay one piece, else a database would write for a minute.
        separate = len(space.parameters) <= max(_MOST.values())
        self._distributions: dict[str, BaseDistribution] = {
            key: IntDistribution(values[0], values[-1]) for key, values in space.parameters.items() if separate
        }
        self._study = self._open(storage, name, pruner)
        self._check(identity, f"The study {name!r} in {storage!r}")
        self._restore()

    def _open(
        self, storage: str | os.PathLike[str] | BaseStorage | None, name: str, pruner: BasePruner | None
    ) -> optuna.Study:
        for attempt in range(_ATTEMPTS):
            try:
                return optuna.create_study(
                    storage=_storage(storage),
                    study_name=name,
                    directions=["minimize"] * self._objectives,
                    pruner=pruner,
                    load_if_exists=True,
                )
            except Exception as error:  # databases raise anything, also where another worker makes the same tables
                failure = error
                time.sleep(random.uniform(0.1, 0.2) * (attempt < _ATTEMPTS - 1))
        raise ConfigError(
            f"Can't open the storage {storage!r}: {failure}. Give an URL such as 'sqlite:///search.db', or the path "
            "of a journal such as 'search.log'."
        ) from failure

    def _check(self, identity: Mapping[str, Any], which: str) -> None:
        # The trials are read first: another worker that starts at this moment writes the attribute before them.
        trials = self._study.get_trials(deepcopy=False)
        known = self._study.user_attrs.get("hf_prune")
        if known is None:
            if trials or len(self._study.directions) != self._objectives:
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
            if _is_alive(trial):
                continue
            try:
                self._study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, UpdateFinishedTrialError):  # another worker gives it back
                continue
            if "member" in trial.user_attrs:
                logger.warning("The worker of trial %d is gone: its sub-network comes again.", trial.number)
                self._enqueue(self._member(trial))
        # One that is asked for and not marked may be lost: what the search begins with had better come twice.
        trials = self._study.get_trials(deepcopy=False)
        safe = (t for t in trials if t.state != TrialState.RUNNING or "worker" in t.user_attrs)
        seen = {self._key(t) for t in safe if "member" in t.user_attrs}
        for member in (self.space.largest, self.space.smallest, self.space.middle):
            if (key := self._key_of(tuple(member.values()))) not in seen:
                seen.add(key)
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
        """The next member to evaluate.

        Returns:
            [`Sample`]: To be handed back to exactly one of [`~SearchStudy.tell`], [`~SearchStudy.stop`] and
            [`~SearchStudy.fail`].
        """
        trials = self._study.get_trials(deepcopy=False)
        # What was broken off comes again, and does not count.
        counted = sum(t.state != TrialState.FAIL or "reason" in t.user_attrs for t in trials)
        sampler = self._study.sampler = self._sampler(counted)
        trial = self._study.ask(self._distributions)
        try:
            if "member" not in trial.user_attrs:
                drawn: Member = trial.params
                if not drawn:
                    assert isinstance(sampler, _MemberSampler)
                    drawn = sampler.draw(self._study)
                trial.set_user_attr("member", list(self.space.fit(drawn).values()))
            trial.set_user_attr("worker", _worker())  # last: with it the member comes again
        except UpdateFinishedTrialError:  # SQLite gave it to two workers, and the other one is done
            return self.ask()
        self._trials[trial.number] = trial
        key = self._key(trial)
        done = (t for t in trials if t.state == TrialState.COMPLETE and self._key(t) == key)
        known = (t.user_attrs["error"] for t in done)
        return Sample(trial.number, self._member(trial), next(known, None))

    def tell(self, sample: Sample, error: float, cost: float) -> None:
        """How good a member is.

        Args:
            sample ([`Sample`]): What [`~SearchStudy.ask`] returned.
            error (`float`): Its error, finite.
            cost (`float`): Its cost, as a ratio to that of the whole model.
        """
        trial = self._trials.pop(sample.number)
        with suppress(UpdateFinishedTrialError):  # by another worker that was given it too
            trial.set_user_attr("error", error)
            self._study.tell(trial, self._values(error, cost), skip_if_finished=True)

    def _values(self, error: float, cost: float) -> list[float]:
        return [error, cost] if self._objectives == 2 else [error + cost]

    def report(self, sample: Sample, step: int, error: float, cost: float) -> bool:
        """How good a member is so far. Whether it is worth going on.

        Args:
            sample ([`Sample`]): What [`~SearchStudy.ask`] returned.
            step (`int`): Number of the evaluation, from 1.
            error, cost (`float`): See [`~SearchStudy.tell`].

        Returns:
            `bool`: `False` if the study's pruner gives it up: then [`~SearchStudy.stop`].
        """
        trial = self._trials[sample.number]
        with suppress(UpdateFinishedTrialError):
            trial.report(self._values(error, cost)[0], step)
        return not trial.should_prune()

    def stop(self, sample: Sample) -> None:
        """A member was given up early. `sample`: what [`~SearchStudy.ask`] returned."""
        self._study.tell(self._trials.pop(sample.number), state=TrialState.PRUNED, skip_if_finished=True)

    def fail(self, sample: Sample, reason: str | None) -> None:
        """A member has no finite error, for a reason; without one it was broken off, and comes again.

        Args:
            sample ([`Sample`]): What [`~SearchStudy.ask`] returned.
            reason (`str`, *optional*): Why. It stays in the study.
        """
        trial = self._trials.pop(sample.number)
        with suppress(UpdateFinishedTrialError):
            if reason is not None:
                trial.set_user_attr("reason", reason)
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        if reason is None:
            self._enqueue(sample.member)

    def evaluated(self) -> list[tuple[Member, float]]:
        """The members that were evaluated, with their errors; of those with the same mask the first.

        Returns:
            `list[tuple[dict[str, int], float]]`: In the order of their trials.
        """
        found: dict[bytes, tuple[Member, float]] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            found.setdefault(self._key(trial), (self._member(trial), trial.user_attrs["error"]))
        return list(found.values())

    def given_up(self) -> int:
        """How many members were given up early."""
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))

    def _key(self, trial: FrozenTrial | optuna.Trial) -> bytes:
        return self._key_of(tuple(trial.user_attrs["member"]))

    def _key_of(self, values: tuple[int, ...]) -> bytes:
        """By which members with the same mask are known. Kept: each trial compares itself with all before it."""
        if values not in self._keys:
            mask = self.space.mask(dict(zip(self.space.parameters, values, strict=True)))
            digest = update_digest(hashlib.sha256(), mask)
            self._keys[values] = digest.digest()
        return self._keys[values]

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
    lock = JournalFileSymlinkLock(str(path))
    if path.exists():
        lock.acquire()  # who writes holds it: half a line is not one that is being written
        try:
            _mend(path)
        finally:
            lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _mend(journal: Path) -> None:
    """Drop the last line where it was cut, by a full disk or a killed worker: Optuna would never read on."""
    with journal.open("rb+") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            logger.warning("The last line of %s is incomplete: it is dropped.", journal)
            file.truncate(whole)


def _worker(process: int | None = None) -> tuple[str, int, float]:
    """Host, process and when that started: after a restart another one may have its number. This one by default."""
    found = psutil.Process(process)
    return socket.gethostname(), found.pid, found.create_time()


def _is_alive(trial: FrozenTrial) -> bool:
    """Whether a worker is at a trial, as far as this host knows."""
    if "worker" not in trial.user_attrs:
        return trial.datetime_start is None or datetime.now() - trial.datetime_start < _MARKED
    host, process, start = trial.user_attrs["worker"]
    if host != socket.gethostname():
        return True
    try:
        return bool(abs(_worker(process)[2] - start) < 1)  # the system's clock, from which it is counted, may be set
    except psutil.NoSuchProcess:
        return False


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
