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
from .card import CARD_FILE, PICTURE_FILE, is_ours, is_repo_id, render_card, stated
from .files import of_a_model, published
from .saving import save_pretrained

logger = logging.get_logger(__name__)


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
    commit. Weights of an earlier model in the repository go with the same commit; a card there that hf_prune did not
    write, or that was claimed by removing the line which says so, stays. If the model that was pruned came from the
    Hub, and no license is known, the one that its card states is copied.

    Args:
        model (`PreTrainedModel`, `str` or path): The model, or a folder that [`save_pretrained`] wrote. Of a folder
            those files are uploaded that hf_prune and transformers, by their names, write for a model: weights and
            configs, mask, report and picture, tokenizer or processor with its chat templates, modeling code, license
            and card. All else stays at home, links that leave the folder too, and the log names it. A card that
            hf_prune did not write is uploaded as it is.
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
        ConfigError: The name can't be that of a repository, there is no token, or `model` is no checkpoint, or one
            with files missing.
        SaveError: The Hub can't be reached, or refuses; or the model can't be saved. What is on disk is as it was.
        MaskError, UnsupportedModelError: Of a model in memory, see [`save_pretrained`].

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
        """Create it unless it is there.

        Args:
            private (`bool`, *optional*): Whether it is private if it is created, by default as on the Hub. `True`
                refuses one that exists and is public.

        Returns:
            `str`: Its name with the user's.

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
        """[`push_to_hub`] of a folder.

        Args:
            folder (`Path`): What [`save_pretrained`] wrote.
            private, revision, create_pr, commit_message, commit_description: See [`push_to_hub`].
            variant (`str`, *optional*): Of the weights: in the repository those of other variants stay.

        Returns:
            `CommitInfo`: As huggingface_hub returns it: `commit_url`, `oid`, `pr_url`.

        Raises:
            ConfigError: The folder holds no checkpoint, or one with files missing.
            SaveError: The Hub can't be reached, or refuses; or the repository must be private, and is public.
        """
        files, left = published(folder)
        _check_complete(folder, files)
        if left:
            logger.warning(f"Not uploaded, as no files of a model: {', '.join(left)}.")
        repo_id = self.create(private)
        goes = of_a_model(variant)
        with self._explaining(), tempfile.TemporaryDirectory() as scratch:
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                self._api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = self._api.list_repo_files(repo_id, revision=revision)
            if CARD_FILE not in files or is_ours(files[CARD_FILE]):
                if CARD_FILE in there and not self._is_ours(revision, scratch):
                    logger.warning(
                        f"The card of {repo_id} stays as it is: hf_prune did not write it, or it was edited. Remove "
                        f"{CARD_FILE} there and push again to get a new one."
                    )
                    files.pop(CARD_FILE, None)
                else:
                    files |= self._documents(files, Path(scratch))
            return self._api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, path) for name, path in files.items()),
                    *(CommitOperationDelete(name) for name in there if goes(name) and name not in files),
                ],
                commit_message=commit_message or "Upload pruned model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def _is_ours(self, revision: str | None, scratch: str) -> bool:
        """Whether hf_prune wrote the card on the Hub, and nobody has claimed it since."""
        return is_ours(Path(self._api.hf_hub_download(self.repo_id, CARD_FILE, revision=revision, local_dir=scratch)))

    def _documents(self, files: dict[str, Path], scratch: Path) -> dict[str, Path]:
        """The card with the repository's name, and the report where it learns of a license."""
        if REPORT_FILE not in files:
            return {}
        found = {CARD_FILE: scratch / CARD_FILE}
        try:
            report = PruningReport.load(files[REPORT_FILE])
            if learned := self._license(report.metadata):
                report.metadata |= learned
                found[REPORT_FILE] = scratch / REPORT_FILE
                report.save(found[REPORT_FILE])
            config = json.loads(files["config.json"].read_text(encoding="utf-8"))
            card = render_card(report, config, self.repo_id, picture=PICTURE_FILE in files)
        except (PruningError, ValueError) as error:
            logger.warning(f"The model is uploaded without a new card: {error}")
            return {}
        found[CARD_FILE].write_text(card, encoding="utf-8")
        return found

    def _license(self, known: dict[str, Any]) -> dict[str, Any]:
        """What the card of the dense model states, where that came from the Hub: loading it fetched no card."""
        if "license" in known or not is_repo_id(known.get("base_model")) or "base_revision" not in known:
            return {}
        try:
            revision = known["base_revision"]
            readme = self._api.hf_hub_download(known["base_model"], CARD_FILE, revision=revision)
        except Exception as error:  # it has none, is gone, or may not be read: a license is not worth a push
            logger.info(f"The license of {known['base_model']} is not known: {type(error).__name__}.")
            return {}
        return {key: value for key, value in stated(Path(readme)).items() if key not in known}

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
            return (
                "the token may not write there. The repository belongs to another, who may take a pull request "
                "(create_pr=True), or the token may only read."
            )
        if status == 404:
            return "there is no such repository, branch or pull request, or the token may not see it."
        return "the Hub failed. Push again later: what has arrived is not sent twice."


def _check_complete(folder: Path, files: dict[str, Path]) -> None:
    disk_bytes(folder)  # raises where there is no checkpoint
    needed = {"config.json": "the model"}
    for name, path in files.items():
        if name.startswith("model.safetensors.index"):
            try:
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise ConfigError(f"{path} is malformed: save the model again.") from error
            needed |= dict.fromkeys(sorted(shards), name)
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in files):
        needed["model.safetensors"] = "the model"
    for name, whose in needed.items():
        if name not in files:
            raise ConfigError(
                f"{folder} lacks {name}, which {whose} needs; a link to a file elsewhere is not followed: save the "
                "model again."
            )
