"""Searches over the sub-networks of one tiny model."""

import optuna
from tiny import tiny_batch, tiny_model

import hf_prune

MODEL = tiny_model("bert")
SPACE = hf_prune.search_space("small", MODEL)
DATA = [tiny_batch("bert", 8, padded=True, labels=True, seed=seed) for seed in range(3)]


def size_error(model) -> float:
    """An error that falls with the size of a sub-network, and costs nothing."""
    return 1 / model.num_parameters()


def search(error=size_error, space=SPACE, **options):
    """The front of a short search."""
    return hf_prune.search_subnetworks(MODEL, space, error, **{"num_samples": 8, **options})


def members(front):
    """The sub-networks that a search evaluated."""
    return [point.member for point in front.evaluated]


def journal(path):
    """The study in a journal, as Optuna sees it."""
    return optuna.load_study(
        study_name="hf_prune",
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
    )
