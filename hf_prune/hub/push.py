"""[`push_to_hub`]: a verified checkpoint with its card, in one commit."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PreTrainedModel
from transformers.utils import logging

from ..benchmark import disk_bytes
from ..errors import ConfigError, PruningError, SaveError
from ..masks import PruningMask
from ..redaction import HIDDEN, redact
from ..report import REPORT_FILE, PruningReport
from ..weight_masks import WeightMask
from .card import CARD_FILE, PICTURE_FILE, is_ours, is_repo_id, render_card
from .saving import save_pretrained
from .staging import of_a_model

logger = logging.get_logger(__name__)

# Pickles, logs and whatever else is in a folder stay at home.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ".png", ".svg", ".onnx")
_NAMES = ("LICENSE", "NOTICE")


def push_to_hub(
    model: PreTrainedModel | str | os.PathLike[str],
    repo_id: str,
    *,
    processing_class: Any = None,
    mask: PruningMask | WeightMask | None = None,
    report: PruningReport | None = None,
    standalone: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
    token: str | None = None,
    **options: Any,
) -> CommitInfo:
    """Upload a model with everything that belongs to it, its card included, in one commit.

    A model is saved to a temporary folder first, reloaded and compared. Nothing is visible on the Hub before the
    commit; after a failure push again: what has arrived is not sent twice, and what is there already makes no second
    commit. Weights of an earlier model in the repository go with the same commit.

    Args:
        model (`PreTrainedModel`, `str` or path): The model, or a folder that [`save_pretrained`] wrote. Of a folder
            the files of the model, its tokenizer and its card are uploaded: no subfolders, no pickles, no logs. A card
            that hf_prune did not write is uploaded as it is.
        repo_id (`str`): `"user/name"`; `"name"` is a repository of your own. It is created if need be.
        processing_class, mask, report, standalone (*optional*): See [`save_pretrained`]; not for a folder.
        private (`bool`, *optional*): Whether the repository is private if it is created, by default as on the Hub.
            With `True` nothing is uploaded to one that exists and is public.
        revision (`str`, *optional*): The branch; created if need be. Defaults to `main`.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of committing to the branch.
        commit_message, commit_description (`str`, *optional*): Of the commit.
        tags (`list[str]`, *optional*): More tags for the card that is made of `report`.
        token (`str`, *optional*): Defaults to the one of `hf auth login` or `HF_TOKEN`.
        options: See [`save_pretrained`]: `max_shard_size`.

    Returns:
        `CommitInfo`: As huggingface_hub returns it: `commit_url`, `oid`, `pr_url`.

    Raises:
        ConfigError: The name can't be that of a repository, there is no token, or `model` is no checkpoint.
        SaveError: The Hub can't be reached, or refuses; or the model can't be saved. What is on disk is as it was.

    Examples:
        ```python
        >>> hf_prune.push_to_hub(model, "user/bert-sst2-60", processing_class=tokenizer, report=result.report)
        >>> hf_prune.push_to_hub("bert-sst2-60", "user/bert-sst2-60", private=True)
        ```
    """
    target = Repository(repo_id, token)
    commit: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message,
        "commit_description": commit_description,
    }
    if not isinstance(model, PreTrainedModel):
        given = {"processing_class": processing_class, "mask": mask, "report": report, "tags": tags, **options}
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name} is for a model in memory: the folder {model} is uploaded as it is.")
        if standalone:
            raise ConfigError(f"standalone is for a model in memory: the folder {model} is uploaded as it is.")
        return target.upload(Path(model), **commit)
    if tags and report is not None:
        report = replace(report, metadata={**report.metadata, "tags": tags})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_pretrained(
            model,
            folder,
            processing_class=processing_class,
            mask=mask,
            report=report,
            standalone=standalone,
            **options,
        )
        return target.upload(folder, variant=options.get("variant"), **commit)


class Repository:
    """A repository to write to.

    Args:
        repo_id (`str`): Its name.
        token (`str`, *optional*): Defaults to the one of this machine.

    Raises:
        ConfigError: The name can't be that of a repository, or there is no token.
    """

    def __init__(self, repo_id: str, token: str | None = None) -> None:
        if not is_repo_id(repo_id):
            raise ConfigError(
                f"{redact(repr(repo_id))} can't be the name of a repository: give 'user/name', in letters, digits, "
                "'-', '_' and '.', without '--' and '..'."
            )
        self.repo_id = repo_id
        self.token = token if token is not None else get_token()
        if not isinstance(self.token, str) or not self.token:
            raise ConfigError("There is no token: run `hf auth login`, set HF_TOKEN, or pass token=.")
        if not self.token.isascii() or any(c.isspace() for c in self.token):
            raise ConfigError("The token is malformed: it has spaces, line ends or foreign letters in it.")
        self._api = HfApi(token=self.token)

    def create(self, private: bool | None = None) -> str:
        """Create it unless it is there. Returns its name with the user's.

        Raises:
            SaveError: The Hub can't be reached, or refuses; or it must be private, and is public.
        """
        with self._explaining():
            self.repo_id = self._api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
            if private and not self._api.model_info(self.repo_id).private:
                raise SaveError(
                    f"{self.repo_id} exists and is public, and private=True was asked for: nothing was uploaded. Make "
                    "it private in its settings, or push to another name."
                )
        return self.repo_id

    def upload(
        self,
        folder: Path,
        *,
        private: bool | None,
        revision: str | None,
        create_pr: bool,
        commit_message: str | None,
        commit_description: str | None,
        variant: str | None = None,
    ) -> CommitInfo:
        """[`push_to_hub`] of a folder."""
        _check_complete(folder)
        repo_id = self.create(private)
        files = _files(folder, repo_id)
        goes = of_a_model(variant)
        with self._explaining():
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                self._api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = self._api.list_repo_files(repo_id, revision=revision)
            return self._api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, content) for name, content in files.items()),
                    *(CommitOperationDelete(name) for name in there if goes(name) and name not in files),
                ],
                commit_message=commit_message or "Upload pruned model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say what to do. The libraries below raise anything, and their words may hold the token."""
        try:
            yield
        except PruningError:
            raise
        except Exception as error:
            said = redact(str(error).replace(str(self.token), HIDDEN)).strip()
            raise SaveError(f"Can't push to {self.repo_id}: {self._advice(error)}\n{said}") from None

    def _advice(self, error: Exception) -> str:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it where there is a network."
        if isinstance(error, ValueError) and "README.md" in str(error):
            return "the Hub does not take the metadata at the head of its README.md: correct them."
        answer: BaseException | None = error  # failed uploads of weights come wrapped
        while answer is not None and not isinstance(answer, HfHubHTTPError):
            answer = answer.__cause__
        if answer is None:
            return "the connection failed. Check the network and push again: what has arrived is not sent twice."
        status = answer.response.status_code
        if status == 401:
            return "the Hub does not know the token. Run `hf auth login` with one that is valid and may write."
        if status == 403:
            return "the token may not write there. The repository belongs to another, or the token may only read."
        if status == 404:
            return "there is no such repository, branch or pull request, or the token may not see it."
        return "the Hub failed. Push again later: what has arrived is not sent twice."


def _check_complete(folder: Path) -> None:
    disk_bytes(folder)  # raises where there is no checkpoint
    for index in folder.glob("model.safetensors.index*.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} is malformed: save the model again.") from error
        for shard in sorted(shards):
            if not (folder / shard).is_file():
                raise ConfigError(f"{folder} lacks {shard}, which {index.name} names: save the model again.")


def _files(folder: Path, repo_id: str) -> dict[str, str | bytes]:
    """What is uploaded of a folder, by name: the path of each file; a card of ours, for the repository's name."""
    found: dict[str, str | bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith((".", "_")):
            if path.suffix in _SUFFIXES or path.name in _NAMES:
                found[path.name] = str(path)
            else:
                logger.warning(f"{path.name} is not uploaded: it is no file of a model, or a pickle.")
    if REPORT_FILE in found and (CARD_FILE not in found or is_ours(folder / CARD_FILE)):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            card = render_card(PruningReport.load(folder), config, repo_id, picture=PICTURE_FILE in found)
            found[CARD_FILE] = card.encode()
        except (PruningError, ValueError) as error:
            logger.warning(f"The model is uploaded without a new card: {error}")
    return found
