"""README and docs: their Python runs, their commands parse, and the site builds with every public name in it."""

import argparse
import os
import re
import shlex
import subprocess
import sys

import pytest
from reader import PAGES, ROOT, code_blocks, commands
from tiny import tiny_model

import hf_prune
from hf_prune import cli

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
def test_the_commands_are_well_formed(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, argv):
        parse(parser, argv)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "hf-prune":
            with pytest.raises(KeyboardInterrupt):
                cli.main(words[1:])
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
