"""[`redact`]: no tokens, no credentials in URLs and no home folders in what is published."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "..."

_SECRETS = (
    # Tokens that one can tell by their looks: Hugging Face, GitHub, OpenAI and Anthropic, Slack, AWS.
    r"(?:hf|hf_oauth|api_org)_[A-Za-z0-9]{16,}",
    r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
    r"\bsk-[A-Za-z0-9_-]{16,}",
    r"\bxox[a-z]-[A-Za-z0-9-]{10,}",
    r"\bAKIA[A-Z0-9]{12,}",
)
_NAMES = r"(?:token|secret|password|passwd|api[_-]?key|access[_-]?key)"
# Whatever it looks like, what follows token= or --api-key is one. A number is none: max_token=5.
_NAMED = re.compile(rf"(?i)({_NAMES}[\"']?\s*[=:]\s*[\"']?|--[\w-]*{_NAMES}\s+|\bbearer\s+)(?!\d+\b)[^\s\"'&,;)}}\]]+")
# The header, whatever its scheme, and curl's -u name:password; two numbers are a user and a group.
_LOGIN = re.compile(
    r"(?i)(authorization[\"']?\s*[=:]\s*[\"']?(?:\w+\s+)?|(?<![\w-])(?:-u\s*|--user[\s=]+)[\"']?(?!\d+:)[^\s:\"']+:)"
    r"[^\s\"'&,;)}\]]+"
)
_KEY = re.compile(
    r"(?i)authorization$|(?:^|hub|hf|auth|access|api)[_-]?token$|secret|passw|api[_-]?key|access[_-]?key"
)
_VARIABLE = re.compile(rf"(?i){_NAMES}$")
# Up to the last @ before the path; a password with a slash in it, which is no port, up to the next one.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/\"'<>]+@|[^\s/:@\"'<>]+:(?!\d+/)[^\s@\"'<>]+@)")
_HOMES = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s\"':,;]+|/root(?![\w.-])")


def redact(value: Any) -> Any:
    """A copy of a value, whatever it nests, without secrets in its strings.

    Hidden are tokens by their looks, by the word before them (`token=`, `--password`, `Authorization:`), and those in
    the environment of this process; passwords after `-u name:`; user and password in URLs; and home folders.
    """
    return _without(value, _in_environment())


def _without(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redacted(value, secrets)
    if isinstance(value, Mapping):
        return {
            _without(key, secrets): HIDDEN if _is_secret(key, item) else _without(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without(item, secrets) for item in value]
    return value


def _is_secret(key: Any, item: Any) -> bool:
    """An entry such as `hub_token: "..."`; counts such as `tokens: 5120` are none."""
    return isinstance(key, str) and isinstance(item, str) and bool(item) and bool(_KEY.search(key))


def _redacted(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern in _SECRETS:
        text = re.sub(pattern, HIDDEN, text)
    text = _CREDENTIALS.sub("", text)
    for words in (_NAMED, _LOGIN):
        text = words.sub(rf"\g<1>{HIDDEN}", text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return _HOMES.sub("~", text)


def _in_environment() -> list[str]:
    values = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= 8}
    return sorted(values, key=len, reverse=True)
