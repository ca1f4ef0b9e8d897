"""The tables of the README are complete. That its code runs is tested in test_docs.py."""

import re

import pytest
from reader import ROOT

import hf_prune
from hf_prune.methods import base

README = (ROOT / "README.md").read_text()


def test_the_table_of_families_is_complete():
    listed = README.partition("## Families")[2].partition("Some layers")[0].lower().replace("-", "").replace(" ", "")
    names = {"gemma3_text": "gemma3(text)", "gpt_neox": "gptneox", "debertav2": "debertav2/v3"}
    for model_type in hf_prune.known_model_types():
        plain = model_type.replace("-", "")
        assert names.get(plain, plain) in listed, model_type


@pytest.mark.parametrize("method", [cls.config_class.__name__ for cls in base._PRUNERS.values()])
def test_the_table_of_methods_is_complete(method):
    assert f"`{method}`" in README


def test_the_links_lead_to_files():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_the_number_of_families_is_right():
    assert f"on {len(hf_prune.known_model_types())} model families" in README
