"""README and docs: their Python runs, their commands parse, and the site builds with every public name in it."""

import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from reader import PAGES, ROOT, code_blocks, commands
from tiny import tiny_model

import hf_prune
from hf_prune import cli
from hf_prune.methods import get_pruner

DOCS = ROOT / "docs"


def with_blocks(language):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if code_blocks(page, language)]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_runs(page, reader):
    names = {"__name__": page.name}
    for number, block in enumerate(code_blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    if page.name == "README.md":
        assert names["model"].num_parameters() < tiny_model("bert").num_parameters()


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_the_commands_are_well_formed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in code_blocks(page, "yaml"):
        Path(block.removeprefix("# ").partition("\n")[0]).write_text(block)
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "hf-prune":
            assert cli._parse(words[1:]).command == words[1]
        for word in words:
            if re.fullmatch(r"(examples|benchmarks)/.*\.(py|yaml)", word):
                assert (ROOT / word).is_file(), command


def test_the_site_builds_without_warnings(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "methods" / "index.html").read_text()
    assert "[<code>" not in page  # every reference of a docstring has become a link or plain code
    assert 'href="#hf_prune.RecoverableConfig"' in page


def test_the_reference_is_complete():
    listed = set(re.findall(r"^::: hf_prune\.(\w+)$", "\n".join(p.read_text() for p in DOCS.glob("api/*.md")), re.M))
    listed |= set(re.findall(r"`(AutoPrunableModelFor\w+)`", (DOCS / "api" / "pruning.md").read_text()))
    assert set(hf_prune.__all__) - listed == set()


def test_every_method_has_a_guide():
    guides = "\n".join(page.read_text() for page in DOCS.glob("guides/*.md"))
    configs = [get_pruner(name).config_class.__name__ for name in hf_prune.known_pruners()]
    assert [name for name in configs if name not in guides] == []


def parameters(function):
    """The names of what a function takes, and of all that it may document: `None` where it takes others."""
    found = [p for name, p in inspect.signature(function).parameters.items() if name not in ("self", "cls")]
    named = [p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return named, named if len(named) == len(found) else None


def documented(docstring):
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", docstring, re.M)
    heads = re.findall(r"^ {4}(\w[\w, ]*?)(?= \(|:)", section[1] if section else "", re.M)
    return [name for head in heads for name in head.split(", ")]


def documented_fields(item):
    """Fields of a dataclass, documented there even where the default is a function."""
    return [field.name for field in dataclasses.fields(item)] if dataclasses.is_dataclass(item) else []


def public_callables():
    """(name, docstring, own parameters, what it may document) of all that is public."""
    for name in hf_prune.__all__:
        item = getattr(hf_prune, name)
        if not inspect.isclass(item):
            yield name, inspect.getdoc(item), *parameters(item)
            continue
        if dataclasses.is_dataclass(item):
            fields = documented_fields(item)
            yield name, inspect.getdoc(item), [f for f in fields if f in vars(item).get("__annotations__", {})], fields
        elif "__init__" in vars(item):
            yield name, inspect.getdoc(item), *parameters(item.__init__)
        for attribute, value in vars(item).items():
            value = getattr(value, "__func__", value)
            if attribute.startswith("_") or not hasattr(value, "__get__") or attribute in documented_fields(item):
                continue
            if inspect.isfunction(value) and value.__doc__:
                yield f"{name}.{attribute}", inspect.getdoc(value), *parameters(value)
            else:  # a property, or what a base class documents
                yield f"{name}.{attribute}", inspect.getdoc(getattr(item, attribute)), [], None


@pytest.mark.parametrize(("name", "docstring", "own", "known"), list(public_callables()), ids=lambda x: str(x)[:40])
def test_docstrings_name_the_parameters(name, docstring, own, known):
    assert docstring, f"{name} has no docstring"
    listed = documented(docstring)
    if listed:
        assert set(own) <= set(listed), f"{name}({own}) documents {listed}"
        assert known is None or set(listed) <= set(known), f"{name}({known}) documents {listed}"
    elif "Made by [`" not in docstring:
        assert len(own) <= (3 if "." in name else 1), f"{name}({own}) has no Args"
