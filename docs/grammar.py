"""How the site reads the docstrings: sections become lists, and [`Name`] becomes a link, here and in the pages."""

import re
from typing import Any

import griffe

import hf_prune

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Examples):\n((?:(?: {4}.*)?(?:\n|$))+)", re.M)
_ENTRY = re.compile(r"^(?=\S)(?:([\w, ]+)(?=:| \())?", re.M)
_FENCED = re.compile(r"(^```.*?^```)", re.S | re.M)
_NAME = re.compile(r"\[`~?(?:hf_prune\.)?([\w.]+)`\](?![\[(])")


def _section(match: re.Match[str]) -> str:
    title, body = match.groups()
    body = re.sub(r"^ {4}", "", body, flags=re.M)
    if title != "Examples":
        body = re.sub(r"\n( +- )", r"\n\n\1", body, count=1)  # Markdown wants a blank line around a list in a list
        if title in ("Returns", "Yields"):  # one entry, whose other lines are no deeper
            body = re.sub(r"\n(?=\S)", "\n    ", body)
        body = _ENTRY.sub(lambda entry: f"\n- **{entry[1]}**" if entry[1] else "\n- ", body)
    return f"**{title.replace('Args', 'Parameters')}**\n\n{body}\n"


def _public(name: str) -> bool:
    return name.partition(".")[0] in hf_prune.__all__


class Grammar(griffe.Extension):
    """Rewrites docstrings in the grammar of Hugging Face as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            module = obj.module

            def link(match: re.Match[str]) -> str:
                name = match[1]
                home = f"{module.path}.{name}"
                if _public(name):  # public names are listed under the package
                    home = f"hf_prune.{name}"
                elif name in module.members and module.members[name].is_alias:
                    home = module.members[name].target_path  # type: ignore[union-attr]
                return f'<autoref optional identifier="{home}"><code>{name}</code></autoref>'

            obj.docstring.value = _NAME.sub(link, _SECTION.sub(_section, obj.docstring.value))


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """In pages a link that leads nowhere is an error of the strict build."""

    def link(match: re.Match[str]) -> str:
        return f"[`{match[1]}`][hf_prune.{match[1]}]"

    return "".join(part if part.startswith("```") else _NAME.sub(link, part) for part in _FENCED.split(markdown))
