"""`--config run.yaml`: the arguments of a command from a file."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import unknown


def parse_with_file(
    parser: argparse.ArgumentParser, command: argparse.ArgumentParser, argv: list[str]
) -> argparse.Namespace:
    """The arguments of a command from the command line, and where that gives none, from the file it names.

    Keys are the long names of flags, or positional arguments. A flag that takes several values takes a list, one that
    takes `KEY=VALUE` a mapping. Values are the text that a shell would pass.

    Args:
        parser (`argparse.ArgumentParser`): The parser of `hf-prune`.
        command (`argparse.ArgumentParser`): The parser of the command. It is changed: nothing in it is required any
            more.
        argv (`list[str]`): The arguments of the command line, with `--config`.

    Returns:
        `argparse.Namespace`: As `parser` would return it.

    Raises:
        SystemExit: The file can't be read, a key is unknown, or a value is out of range; with code 2.
    """
    actions = [action for action in command._actions if action.dest != "help"]
    defaults = {action.dest: action.default for action in actions}
    required = [action for action in actions if action.required]
    for action in actions:  # so that what is parsed is what is given
        action.default, action.required = argparse.SUPPRESS, False
    given = vars(parser.parse_args(argv))
    path = given["config"]
    names = {_name(action): action for action in actions if action.dest != "config"}
    tokens: list[str] = []
    read = _read(command, path)
    for key, value in read.items():
        if "_" in key and (same := key.replace("_", "-")) in read:
            command.error(f"{path}: {key!r} and {same!r} are the same key, give it once")
        if key.replace("_", "-") not in names:
            command.error(f"{path}: {unknown('key', key, names)}")
        action = names[key.replace("_", "-")]
        try:
            found = _tokens(action, value)
        except ValueError as error:
            command.error(f"{path}: {key} {error}")
        tokens = [*tokens, *found] if action.option_strings else [*found, *tokens]
    given = {**vars(command.parse_args(tokens)), **given}
    missing = [_shown(action) for action in required if action.dest not in given]
    if missing:
        command.error(f"the following arguments are required: {', '.join(missing)}")
    return argparse.Namespace(**{**defaults, **given})


def _read(command: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    import yaml

    # BaseLoader builds text, lists and mappings alone: 2:4 stays a pattern, which YAML takes for 124 seconds.
    class Loader(yaml.BaseLoader):  # type: ignore[misc]  # yaml is not type-checked here
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.MarkedYAMLError(problem=f"{twice!r} is given twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        command.error(f"can't read the arguments in {path}: {error}")
    if not isinstance(found, dict):
        command.error(f"{path} must hold `key: value` lines, with the long names of flags as keys")
    return found


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1].removeprefix("--") if action.option_strings else action.dest


def _shown(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def _tokens(action: argparse.Action, value: Any) -> list[str]:
    """What stands for a value on the command line."""
    flag = list(action.option_strings[-1:])
    if action.nargs == 0:
        if value not in ("true", "false"):
            raise ValueError(f"takes true or false, got {value!r}")
        return flag if value == "true" else []
    pairs = "=" in (action.metavar or "")
    if isinstance(value, dict) and pairs:
        items = [f"{key}={','.join(item) if isinstance(item, list) else item}" for key, item in value.items()]
    elif isinstance(value, list) and (pairs or action.nargs == "+"):
        items = value
    else:
        items = [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"can't be {value!r}")
    if not all(items):
        raise ValueError("has no value")
    return [*flag, *items] if action.nargs == "+" or not flag else [f"{flag[0]}={item}" for item in items]
