"""The model card: what a [`PruningReport`] knows, in words, and only what was measured."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from ..errors import ConfigError, PruningError
from ..layout import KEY
from ..plots import plot_units
from ..redaction import redact
from ..report import REPORT_FILE, SCHEMA_VERSION, PruningReport
from ..tables import markdown_table
from . import sections
from .markdown import block, code, line, text
from .standalone import auto_classes

CARD_FILE, PICTURE_FILE = "README.md", "pruning_layers.png"
MARKER = "<!-- Rendered by hf_prune. Remove this line if you edit the card: hf_prune then leaves it alone. -->"


def is_ours(readme: Path) -> bool:
    """Whether a card may be replaced: hf_prune rendered it, and nobody has claimed it since."""
    return readme.is_file() and MARKER in readme.read_text(encoding="utf-8", errors="replace").splitlines()


def write_card(
    folder: str | os.PathLike[str], report: PruningReport | None = None, *, name: str | None = None
) -> Path:
    """Write the model card of a saved model, `README.md`, and its picture. `save_pretrained` has done so already;
    do it again for a report that has learned more since.

    Args:
        folder (`str` or path): What [`save_pretrained`] wrote.
        report ([`PruningReport`], *optional*): To save in the folder first. Defaults to the report that is there.
        name (`str`, *optional*): What the card calls the model, such as its repository. Defaults to the folder's name.

    Returns:
        `Path`: The card.

    Raises:
        ConfigError: There is a card that hf_prune did not write, or that was claimed by removing the line which says
            so.
        PruningError: There is no report in the folder, it is malformed, a newer hf_prune wrote it, or the folder can't
            be written. Nothing in it has changed.

    Examples:
        ```python
        >>> rows = compare({"dense": "bert-sst2", "pruned": "bert-sst2-60"})
        >>> report = PruningReport.load("bert-sst2-60")
        >>> report.benchmark = [asdict(row) for row in rows]
        >>> report.evaluation = [{"metric": "accuracy", "before": 0.865, "after": 0.853, "n": 1072}]
        >>> write_card("bert-sst2-60", report)
        ```
    """
    folder = Path(folder).resolve()
    card = folder / CARD_FILE
    if card.exists() and not is_ours(card):
        raise ConfigError(f"{card} was not written by hf_prune, or was edited: move it away to get a new one.")
    known = report if report is not None else PruningReport.load(folder)
    if known.schema_version > SCHEMA_VERSION:
        raise PruningError(
            f"The report is of schema {known.schema_version}, written by a newer hf_prune; this one knows schema "
            f"{SCHEMA_VERSION} and would lose what is new: update hf_prune."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Inside the folder, for a file can take another's place at once only on the same file system.
        with tempfile.TemporaryDirectory(prefix=".card-", dir=folder) as scratch:
            new = Path(scratch)
            draw_layers(known, new / PICTURE_FILE)
            picture = any((place / PICTURE_FILE).exists() for place in (new, folder))
            rendered = render_card(known, config, name or folder.name, picture=picture)
            (new / CARD_FILE).write_text(rendered, encoding="utf-8")
            if report is not None:
                report.save(new)
            for file in (PICTURE_FILE, REPORT_FILE, CARD_FILE):  # what the card shows comes before it
                if (new / file).exists():
                    os.replace(new / file, folder / file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PruningError(f"Can't write a card for {folder}: {error!r}") from error
    return card


def draw_layers(report: PruningReport, path: Path) -> None:
    """Draw the units that each layer keeps, where there are any and matplotlib is installed.

    Args:
        report ([`PruningReport`]): What was pruned. Without a pruned unit nothing is written.
        path (`Path`): Where to write it. The suffix chooses the format.
    """
    if any(row["kept"] < row["size"] for row in report.units):
        try:
            plot_units(report.units, path)
        except ImportError:
            return


def render_card(report: PruningReport, config: Mapping[str, Any], name: str, *, picture: bool = False) -> str:
    """A model card.

    Args:
        report ([`PruningReport`]): What was done and measured.
        config (`dict`): The model's `config.json`: it decides how the model loads.
        name (`str`): What to call the model, such as its repository `"user/bert-sst2-60"`.
        picture (`bool`, *optional*, defaults to `False`): `pruning_layers.png` lies beside the card.

    Returns:
        `str`: The card, as it stands in `README.md`. Whatever the report says is escaped, and without secrets.

    Raises:
        PruningError: The report is malformed.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": text, "code": code, "block": block}
    name, report = redact(name), PruningReport.from_dict(redact(report.to_dict()))
    template = (files(__package__) / "model_card_template.md").read_text(encoding="utf-8")
    try:
        # A layout stands in the config; that weights are compressed only the save knows.
        needs = config.get(KEY) is not None or bool((report.verified or {}).get("hf_prune"))
        remote = isinstance(config.get("auto_map"), Mapping)
        verified = report.verified or {}
        importable = bool(verified.get("usage")) or hasattr(transformers, report.model_class)
        metadata = _metadata(report, name, needs)
        return environment.from_string(template).render(
            metadata=metadata.to_yaml(),
            marker=MARKER,
            name=name,
            report=report,
            base=metadata.base_model if isinstance(metadata.base_model, str) else None,
            usage=usage(
                json.dumps(name, ensure_ascii=False),
                report.model_class,
                processor=verified.get("processor"),
                variant=verified.get("variant"),
                needs_hf_prune=needs,
                auto_class=_auto_class(report) if remote else None,
                importable=importable,
            ),
            claim=_claim(report.verified),
            picture=PICTURE_FILE if picture else None,
            roads=_roads(report, needs, remote, importable),
            section=sections,
        )
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise PruningError(f"The pruning report is malformed, no card can be made of it: {error!r}.") from error


# Metadata


_STATED = ("license", "license_name", "license_link", "language")


def origin(model: PreTrainedModel) -> dict[str, Any]:
    """What is known on this machine of the model that was pruned: its id on the Hub, and what its card states.

    Args:
        model (`PreTrainedModel`): The pruned model, whose config says where it was loaded from.

    Returns:
        `dict[str, Any]`: As far as they are known `base_model`, `base_revision`, `license`, `license_name`,
        `license_link` and `language`.
    """
    source = str(model.config.name_or_path or "")
    if source and Path(source).is_dir():  # a folder has no public name, the model that it was made of may have one
        return stated(Path(source) / CARD_FILE, "base_model", *_STATED)
    if not is_repo_id(source):
        return {}
    # A model does not know its revision: it can be told only where the cache holds a single one.
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="model"), "snapshots")
    snapshots = [config.parent for config in cached.glob("*/config.json")]
    found = {"base_model": source} if snapshots else {}  # else it may be a folder that is gone
    if len(snapshots) == 1:
        found |= {"base_revision": snapshots[0].name, **stated(snapshots[0] / CARD_FILE)}
    return found


def stated(readme: Path, *keys: str) -> dict[str, Any]:
    """What a card states under these keys of its metadata, by default license and language.

    Args:
        readme (`Path`): The card. One that is missing or malformed states nothing.
        keys (`str`): The keys.

    Returns:
        `dict[str, Any]`: Only what is stated.
    """
    if not readme.is_file():
        return {}
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # another's card, and YAML raises anything
        return {}
    return {key: data[key] for key in keys or _STATED if data.get(key)}


def is_repo_id(name: Any) -> bool:
    """Whether a name could be that of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return isinstance(name, str)


def _metadata(report: PruningReport, name: str, needs_hf_prune: bool) -> ModelCardData:
    given = report.metadata
    tags = [KEY, "pruned", "weight-pruning" if report.weights else "structured-pruning", report.method]
    tags += [given["tags"]] if isinstance(given.get("tags"), str) else given.get("tags") or []
    task = given.get("pipeline_tag") or _task(report.model_class)
    data: dict[str, Any] = {
        "base_model": _those(given.get("base_model"), is_repo_id),
        "license": _one(given.get("license"), r"[a-z0-9][a-z0-9.+-]*"),
        "license_name": _one(given.get("license_name"), r"[A-Za-z0-9][\w.+ -]*"),
        "license_link": _one(given.get("license_link"), r"(https://)?[\w./%#?=-]+"),
        "language": _those(given.get("language"), lambda x: bool(re.fullmatch(r"[A-Za-z]{2,12}(-[A-Za-z]+)?", x))),
        "datasets": _those(given.get("datasets") or sections.data_of(report).get("dataset"), is_repo_id),
        "pipeline_tag": _one(task, r"[a-z0-9-]+"),
        "library_name": KEY if needs_hf_prune else "transformers",
        "tags": _those(tags, lambda tag: bool(re.fullmatch(r"[\w.:+-]+", tag))),
    }
    if data["base_model"]:
        data["base_model_relation"] = "finetune"  # the Hub has no value for pruning; without one it guesses
    results = [
        EvalResult(
            task_type=data["pipeline_tag"],
            dataset_type=line(row["dataset"]),
            dataset_name=line(row["dataset"]),
            dataset_config=line(row["config"]) if row.get("config") else None,
            dataset_split=line(row["split"]) if row.get("split") else None,
            dataset_revision=line(row["revision"]) if row.get("revision") else None,
            metric_type=line(row["metric"]),
            metric_value=float(row["after"]),
        )
        for row in report.evaluation
        if row.get("dataset") and data["pipeline_tag"]
    ]
    if results:
        data |= {"model_name": line(name), "eval_results": results}
    return ModelCardData(**{key: value for key, value in data.items() if value})


def _one(value: Any, pattern: str) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def _those(value: Any, legal: Callable[[str], bool]) -> str | list[str] | None:
    if isinstance(value, str):
        return value if legal(value) else None
    return [item for item in value if isinstance(item, str) and legal(item)] if isinstance(value, list) else None


def _task(model_class: str) -> str | None:
    def names(mapping: Any) -> set[str]:
        return {name for value in mapping.values() for name in ([value] if isinstance(value, str) else value)}

    return next((task for task, mapping in TASK_MAPPING.items() if model_class in names(mapping)), None)


# How it loads


def usage(
    where: str,
    model_class: str,
    *,
    processor: str | None = None,
    variant: str | None = None,
    needs_hf_prune: bool = False,
    auto_class: str | None = None,
    importable: bool = True,
) -> str:
    """The lines that load a model. A save runs them on what it wrote.

    Args:
        where (`str`): The folder or repository, as a Python literal.
        model_class (`str`): Name of the class.
        processor (`str`, *optional*): The auto class of the tokenizer or processor that was saved with it.
        variant (`str`, *optional*): Of the weights.
        needs_hf_prune (`bool`, *optional*, defaults to `False`): transformers alone can't load it.
        auto_class (`str`, *optional*): What loads it with its remote code.
        importable (`bool`, *optional*, defaults to `True`): transformers has the class.

    Raises:
        ValueError: `model_class` can't be the name of a class.
    """
    if not model_class.isidentifier():
        raise ValueError(f"{model_class!r} names no class")
    options = f", variant={json.dumps(variant)}" if variant else ""
    first, cls = [], auto_class or model_class
    if auto_class is not None:
        options += ", trust_remote_code=True"
    elif needs_hf_prune:
        first.append("import hf_prune  # must be installed: it rebuilds the shapes")
    loads = [f"model = {cls}.from_pretrained({where}{options})"]
    names = [cls] if auto_class is not None or importable else []
    if processor in PROCESSORS:
        names.append(processor)
        loads.append(f"{PROCESSORS[processor]} = {processor}.from_pretrained({where})")
    if names:
        first.append(f"from transformers import {', '.join(sorted(names))}")
    if cls not in names:
        first.append(f"# transformers has no {cls}: import it from the code that defines it.")
    return "\n".join([*first, "", *loads])


def _auto_class(report: PruningReport) -> str:
    """What loads a model with its remote code."""
    autos = auto_classes(report.model_type).items()
    return next((auto for auto, loads in autos if loads == report.model_class), "AutoModel")


PROCESSORS = {
    "AutoTokenizer": "tokenizer",
    "AutoProcessor": "processor",
    "AutoImageProcessor": "image_processor",
    "AutoFeatureExtractor": "feature_extractor",
}


def _claim(verified: Mapping[str, Any] | None) -> str:
    if verified is None:
        return "These lines were not run when the model was saved."
    outputs = (
        "and the outputs on a random batch agreed" if verified["outputs"] else "and the outputs were not compared"
    )
    how = f"{text(verified['dtype'])}, attention {text(verified['attention'])}"
    if verified["remote_code"]:
        what = (
            "the class behind these lines was loaded from the saved files and their code, with hf_prune switched off"
        )
    elif verified.get("usage"):
        what = "these lines were run on the saved files"
    else:
        what = "the class behind these lines loaded the saved files"
    return (
        f"When the model was saved, {what} ({how}). The weights were equal to those in memory to the last bit, "
        f"{outputs}."
    )


def _roads(report: PruningReport, needs_hf_prune: bool, remote: bool, importable: bool) -> str:
    verified, tested, untested = report.verified or {}, "when it was saved", "not tested"
    yes = "yes" if importable else f"with the code of `{code(report.model_class)}`"
    plain = bool(verified) and not needs_hf_prune and not verified["remote_code"]
    imported = bool(verified) and needs_hf_prune and not verified["remote_code"]
    rows = [
        [
            "transformers alone",
            "no" if needs_hf_prune else yes,
            tested if plain else "" if needs_hf_prune else untested,
        ],
        ["transformers after `import hf_prune`", yes, tested if imported else untested],
        [
            "`trust_remote_code=True`, hf_prune not installed",
            "yes" if remote else "no" if needs_hf_prune else "not needed",
            "" if not remote else tested if verified.get("remote_code") else untested,
        ],
        ["ONNX", *(("yes", "when its latency was measured") if _has_run_as_onnx(report) else ("", untested))],
    ]
    return markdown_table(["With", "loads", "tested"], rows)


def _has_run_as_onnx(report: PruningReport) -> bool:
    """A graph is timed only once it has computed what the model does."""
    return any(row.onnx_latency for row in sections.measurements(report)[-1:])
