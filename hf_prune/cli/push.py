"""`hf-prune push`: upload a saved model to the Hub."""

import argparse
from pathlib import Path
from typing import Any

from ..hub import push_to_hub

_DESCRIPTION = """\
Upload a model that was saved with its report, tokenizer and model card to the
Hub, in one commit. Log in first, with `hf auth login` or the environment
variable HF_TOKEN. After a failure call it again: what has arrived is not sent
twice.
"""
_EXAMPLES = """\
examples:
  hf-prune push ./bert-sst2-60 user/bert-sst2-60 --private
  hf-prune push ./bert-sst2-60 bert-sst2-60 --revision kcm-60
  hf-prune push ./bert-sst2-60 organisation/bert-sst2-60 --create-pr

Subfolders, pickles and hidden files stay at home.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and its arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("folder", metavar="FOLDER", help="a folder that save_pretrained or `hf-prune prune` wrote")
    parser.add_argument(
        "repo", metavar="REPO", help="user/name, or name for one of your own; created if it is not there"
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="create it private, and upload nothing to one that is public; default: as on the Hub",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="the branch, created if need be; default: main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", metavar="TEXT", help="of the commit; default: Upload pruned model")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What the command has done, as data and as text."""
    done = push_to_hub(
        Path(args.folder).expanduser(),
        args.repo,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    data = {"commit": done.oid, "url": done.commit_url, "pull_request": done.pr_url}
    return data, f"Uploaded {args.folder}: {done.pr_url or done.commit_url}"
