"""Pushing to a Hub and loading from it, over the Hub's HTTP protocol: see loopback_hub.py and push_client.py."""

import hashlib
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import transformers
from huggingface_hub import ModelCard
from loopback_hub import OTHER_TOKEN, READ_TOKEN, TOKEN, LoopbackHub
from pruned import shrunk
from tiny import tiny_model

import hf_prune
from hf_prune import cli
from hf_prune.errors import ConfigError, SaveError
from hf_prune.hub.card import MARKER
from hf_prune.hub.files import VOCABULARIES, published

HERE = Path(__file__).parent
ALWAYS = {".gitattributes", "README.md", "config.json", "model.safetensors", "pruning_layers.png"}
ALWAYS |= {"pruning_mask.safetensors", "pruning_report.json"}
WORDS = {"tokenizer.json", "tokenizer_config.json"}


def run(code, hub, home, *arguments, **environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    path = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    return subprocess.run(
        [sys.executable, *code, *map(str, arguments)],
        env={**inherited, **path, **hub.client_environment(home), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The Hub after the client is done, with what that has printed."""
    scratch = tmp_path_factory.mktemp("client")
    with LoopbackHub() as hub:
        hub.scratch = scratch
        hub.done = run([str(HERE / "push_client.py")], hub, scratch / "home", scratch)
        assert hub.done.returncode == 0, hub.done.stderr[-5000:]
        hub.printed = json.loads(hub.done.stdout.splitlines()[-1])
        yield hub


def commits(client, repo, branch="main"):
    return client.repos[repo].branches[branch]


def card(commit):
    return ModelCard(commit.files["README.md"].decode())


@pytest.mark.parametrize(
    ("repo", "files"),
    {
        "plain": ALWAYS | WORDS,
        "layout": ALWAYS,
        "standalone": ALWAYS | {"modeling_hf_prune.py"},
        "private": None,
        "trained-end": ALWAYS | WORDS,
    }.items(),
)
def test_one_commit_brings_everything_and_our_card(client, repo, files):
    first, *others = commits(client, f"user/{repo}")
    assert first.title == "initial commit" and len(others) == 1
    (commit,) = others
    assert files is None or set(commit.files) == files
    assert MARKER in commit.files["README.md"].decode()
    assert f'from_pretrained("user/{repo}"' in card(commit).text


@pytest.mark.parametrize(
    "road",
    ["plain", "layout", "folder", "revision", "pull request loads", "another's pull request", "private"],
)
def test_what_is_on_the_hub_computes_what_was_in_memory(client, road):
    assert client.printed["results"][road] is True


def test_remote_code_loads_where_hf_prune_is_not_installed(client, tmp_path):
    code = """
import sys
sys.modules["hf_prune"] = None
import torch, transformers as T
from tiny import tiny_batch
model = T.AutoModelForSequenceClassification.from_pretrained("user/standalone", trust_remote_code=True).eval()
with torch.no_grad():
    found = model(**tiny_batch("bert")).logits
assert torch.equal(found, torch.load(sys.argv[1])), "other logits"
model = T.AutoModelForSequenceClassification.from_pretrained("user/plain")
assert model.num_parameters() < 30_000, "not the pruned one"
"""
    done = run(["-c", code], client, tmp_path, client.scratch / "standalone.pt")
    assert done.returncode == 0, done.stderr[-3000:]


def test_metadata(client):
    plain, layout = (card(commits(client, f"user/{repo}")[1]).data for repo in ("plain", "layout"))
    assert (plain.library_name, layout.library_name) == ("transformers", "hf_prune")
    assert plain.pipeline_tag == "text-classification" and "tiny" in plain.tags and "tiny" not in layout.tags
    trained = card(commits(client, "user/trained-end")[1]).data
    assert (trained.license, trained.language) == ("mit", "en")


def test_of_a_folder_only_the_model_is_uploaded(client):
    _, commit = commits(client, "user/folder")
    shards = {name for name in commit.files if name.startswith("model-0000")}
    assert len(shards) > 1
    assert set(commit.files) - shards == (ALWAYS | WORDS | {"model.safetensors.index.json"}) - {"model.safetensors"}
    left = ".env, checkpoint-1, credentials.json, train_log.txt, training_args.bin"
    assert f"Not uploaded, as no files of a model: {left}." in client.done.stderr


def test_weights_of_an_earlier_push_go(client):
    _, shards, whole = commits(client, "user/resharded")
    assert "model.safetensors" not in shards.files and "model.safetensors.index.json" in shards.files
    assert {name for name in whole.files if name.startswith("model")} == {"model.safetensors"}


def test_branches_and_pull_requests_leave_main_alone(client):
    repo = client.repos["user/plain"]
    assert {branch: len(found) for branch, found in repo.branches.items()} == {"main": 2, "layout": 2, "refs/pr/1": 1}
    assert client.printed["results"]["pull request"].endswith("/user/plain/discussions/1")
    assert {branch: len(found) for branch, found in client.repos["other/taken"].branches.items()} == {
        "main": 1,
        "refs/pr/1": 1,
    }
    for branch in ("layout", "refs/pr/1"):
        files = repo.branches[branch][-1].files
        assert set(files) == ALWAYS | WORDS and files["config.json"] != repo.find("main").files["config.json"]


def test_private_stays_private(client):
    assert client.repos["user/private"].private and client.repos["user/trained-end"].private
    assert not client.repos["user/plain"].private


def test_a_card_of_somebody_else_is_uploaded_as_it_is(client):
    _, first, second = commits(client, "user/own-card")
    assert first.files["README.md"] == b"---\nlicense: mit\n---\n# My words\n"
    assert second.files["README.md"] == b"---\nlicense: mit\n---\n# My better words\n"


def test_a_card_that_was_edited_on_the_hub_stays(client):
    _, first, edited, last = commits(client, "user/claimed")
    assert MARKER in first.files["README.md"].decode() and last.files["README.md"] == b"# Edited\n"
    assert last.files["model.safetensors"] != edited.files["model.safetensors"]
    assert "The card of user/claimed stays as it is" in client.done.stderr


def test_a_dense_model_of_the_hub_is_named_and_its_license_copied(client):
    revision = commits(client, "user/dense")[-1].sha
    assert client.printed["results"]["unknown license"] == {"base_model": "user/dense", "base_revision": revision}
    for repo in ("child", "child-in-memory"):
        _, commit = commits(client, f"user/{repo}")
        data = card(commit).data
        assert (data.base_model, data.license, data.language) == ("user/dense", "mit", "en")
        assert f"`{revision}`" in card(commit).text
        metadata = json.loads(commit.files["pruning_report.json"])["metadata"]
        assert (metadata["base_revision"], metadata["license"]) == (revision, "mit")
    assert client.requests.count(("GET", f"/user/dense/resolve/{revision}/README.md")) == 1


def test_a_license_that_can_not_be_read_is_left_out(client):
    data = card(commits(client, "user/orphan")[1]).data
    assert data.base_model == "user/plain" and data.license is None


@pytest.mark.parametrize("failure", ["refused", "unknown", "lost"])
def test_what_has_arrived_is_not_sent_twice(client, failure):
    weights = commits(client, f"user/{failure}")[1].files["model.safetensors"]
    assert client.requests.count(("PUT", f"/_lfs/{hashlib.sha256(weights).hexdigest()}")) == 1


@pytest.mark.parametrize("failure", ["flaky", "cut", "broken", "refused", "unknown", "no network", "lost"])
def test_after_a_failure_the_next_try_makes_the_one_commit(client, failure):
    assert client.printed["results"].get(failure, True) is True  # the folder is intact, and what was pushed loads
    _, commit = commits(client, f"user/{failure.replace(' ', '-')}")
    assert set(commit.files) == ALWAYS


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        ("cut", "SaveError", "push again"),
        ("broken", "SaveError", "Push again later"),
        ("refused", "SaveError", "may not write"),
        ("unknown", "SaveError", "hf auth login"),
        ("no network", "SaveError", "Check the network"),
        ("lost", "SaveError", "push again"),
        ("public", "SaveError", "exists and is public"),
        ("another's", "SaveError", "belongs to another"),
        ("taken", "SaveError", "create_pr=True"),
        ("read only", "SaveError", "may only read"),
        ("wrong token", "SaveError", "hf auth login"),
        ("broken token", "ConfigError", "token is malformed"),
        ("no token", "ConfigError", "HF_TOKEN"),
        ("license", "SaveError", "license.*must be one of"),
        ("checkpoints", "ConfigError", "hub_strategy must be"),
    ],
)
def test_errors_say_what_to_do(client, failure, kind, message):
    said = client.printed["errors"][failure]
    assert f"errors.{kind}: " in said and re.search(message, said, re.DOTALL)


def test_refused_pushes_leave_no_trace(client):
    assert len(commits(client, "user/plain")) == 2 and len(commits(client, "other/taken")) == 1
    assert not client.repos.keys() & {"other/plain", "user/wrong", "user/read-only", "user/no-token"}
    assert len(commits(client, "user/license")) == 1  # empty, as it was created
    assert client.printed["results"]["intact"] is True


def test_no_token_is_printed_logged_or_uploaded(client):
    for token in (TOKEN, OTHER_TOKEN, READ_TOKEN, "wrongWRO"):
        assert token not in client.done.stdout and token not in client.done.stderr
        for repo in client.repos.values():
            for found in repo.branches.values():
                assert not any(token.encode() in data for commit in found for data in commit.files.values())


def test_every_save_pushes_a_shrunk_model(client):
    _, *pushed = commits(client, "user/trained-every_save")
    assert [commit.title for commit in pushed] == ["Training in progress, step 4", "Model save"]
    assert "The training goes on" in client.done.stderr  # the push at step 2 failed
    for commit in pushed:
        assert set(commit.files) == ALWAYS | WORDS and MARKER in commit.files["README.md"].decode()
    report = json.loads(pushed[-1].files["pruning_report.json"])
    assert sum(row["kept"] for row in report["units"] if row["kind"] == "heads") == 5
    assert [row["metric"] for row in report["evaluation"]] == ["loss", "accuracy"]
    assert "openreview.net/forum?id=S4duStTKGL" in card(pushed[-1]).text
    assert client.printed["results"]["every_save"] and client.printed["results"]["end"]


class TestBeforeAnyNetwork:
    """These need no Hub, and must not reach for one."""

    @pytest.mark.parametrize(
        "name", ["../x", "user/..x", "a/b/c", "user/x--y", "-x", "", "https://x.y/z", None, 5, "é"]
    )
    def test_names(self, tmp_path, name):
        with pytest.raises(ConfigError, match="can't be the name of a repository"):
            hf_prune.push_to_hub(tmp_path, name, token="hf_x")

    def test_offline(self, tmp_path):
        hf_prune.save_pretrained(shrunk("bert"), tmp_path / "model")
        with pytest.raises(SaveError, match="unset it where there is a network"):
            hf_prune.push_to_hub(tmp_path / "model", "user/x", token="hf_x")

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(ConfigError, match="no checkpoint"):
            hf_prune.push_to_hub(tmp_path, "user/x", token="hf_x")

    def test_a_missing_shard(self, tmp_path):
        hf_prune.save_pretrained(shrunk("bert"), tmp_path / "model", max_shard_size="20KB")
        next((tmp_path / "model").glob("model-00002*")).unlink()
        with pytest.raises(ConfigError, match="lacks model-00002"):
            hf_prune.push_to_hub(tmp_path / "model", "user/x", token="hf_x")

    def test_links_out_of_the_folder(self, tmp_path):
        folder, away = tmp_path / "model", tmp_path / "away"
        hf_prune.save_pretrained(shrunk("bert"), folder)
        away.write_text("secret")
        (folder / "vocab.txt").symlink_to(away)
        (folder / "merges.txt").write_text("a b")
        (folder / "dict.txt").symlink_to("merges.txt")
        taken, left = published(folder)
        assert left == ["vocab.txt"] and {"merges.txt", "dict.txt"} <= set(taken)
        (folder / "model.safetensors").replace(away)
        (folder / "model.safetensors").symlink_to(away)
        with pytest.raises(ConfigError, match="lacks model.safetensors.*link"):
            hf_prune.push_to_hub(folder, "user/x", token="hf_x")

    def test_all_that_tokenizers_of_transformers_save_is_uploaded(self, tmp_path):
        sources = Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")
        tables = [
            t for source in sources for t in re.findall(r"VOCAB_FILES_NAMES = {.*?}", source.read_text(), re.DOTALL)
        ]
        names = {name for table in tables for name in re.findall(r'"([\w.-]+\.\w+)"', table)}
        assert {"source.spm", "tokenizer.json", "vocab.txt"} <= names
        for name in names | {"chat_template.jinja", "preprocessor_config.json", "trainer_state.json"}:
            (tmp_path / name).touch()
            assert name.endswith(".json") or any(fnmatch(name, pattern) for pattern in VOCABULARIES)
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tools.jinja").touch()
        assert published(tmp_path)[1] == ["trainer_state.json"]

    @pytest.mark.parametrize("option", [{"standalone": True}, {"tags": ["x"]}, {"max_shard_size": "1GB"}])
    def test_options_of_a_model_for_a_folder(self, tmp_path, option):
        with pytest.raises(ConfigError, match="is for a model in memory"):
            hf_prune.push_to_hub(tmp_path, "user/x", token="hf_x", **option)


MARIAN = """
import sys
import torch, transformers as T
import hf_prune
tokenizer = T.MarianTokenizer.from_pretrained(sys.argv[1])
model = hf_prune.prunable(T.MarianMTModel.from_pretrained(sys.argv[1])).eval()
model.prune(hf_prune.MagnitudeConfig(budget={"macs": 0.8}))
model.shrink()
model.push_to_hub("user/marian", processing_class=tokenizer)

loaded, words = T.MarianMTModel.from_pretrained("user/marian").eval(), T.AutoTokenizer.from_pretrained("user/marian")
assert type(words) is T.MarianTokenizer and words.get_vocab() == tokenizer.get_vocab()
sources, targets = ["a good film", "so bad a film"], ["ein guter Film", "gar nicht gut"]
assert words(sources, text_target=targets).data == tokenizer(sources, text_target=targets).data
ids = words(text_target=targets).input_ids
assert words.batch_decode(ids, skip_special_tokens=True) == targets
inputs = words(sources, return_tensors="pt", padding=True)
with torch.no_grad():
    mine, theirs = (m(**inputs, decoder_input_ids=inputs.input_ids).logits for m in (model, loaded))
    assert torch.equal(mine, theirs), "other logits"
    generated = [m.generate(**inputs, max_new_tokens=5, num_beams=2) for m in (model, loaded)]
assert torch.equal(*generated), "another translation"
"""


def test_a_marian_tokenizer_with_its_two_models_of_pieces(client, tmp_path):
    pieces = pytest.importorskip("sentencepiece")
    folder, vocabulary = tmp_path / "marian", {"</s>": 0, "<unk>": 1}
    folder.mkdir()
    texts = {
        "source": ["a good film", "a very bad film", "the film is good", "not so bad at all"],
        "target": ["ein guter Film", "ein sehr schlechter Film", "der Film ist gut", "gar nicht so schlecht"],
    }
    for side, lines in texts.items():
        with (folder / f"{side}.spm").open("wb") as file:
            pieces.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, vocab_size=30, hard_vocab_limit=False, minloglevel=2
            )
        model = pieces.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        for piece in map(model.id_to_piece, range(3, len(model))):  # after <unk>, <s> and </s>
            vocabulary.setdefault(piece, len(vocabulary))
    vocabulary["<pad>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    files = {"source_spm": "source.spm", "target_spm": "target.spm", "vocab": "vocab.json"}
    paths = {name: str(folder / file) for name, file in files.items()}
    transformers.MarianTokenizer(**paths, source_lang="en", target_lang="de").save_pretrained(folder)
    special = {"pad_token_id": vocabulary["<pad>"], "eos_token_id": 0, "decoder_start_token_id": vocabulary["<pad>"]}
    tiny_model("marian", vocab_size=len(vocabulary), **special).save_pretrained(folder)

    done = run(["-c", MARIAN], client, tmp_path / "home", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    _, commit = commits(client, "user/marian")
    assert set(commit.files) >= {*files.values(), "tokenizer_config.json"}
    assert all(commit.files[name] == (folder / name).read_bytes() for name in ("source.spm", "target.spm"))
    assert "AutoTokenizer.from_pretrained" in card(commit).text


def test_command_line(client, tmp_path, capsys):
    code = ["-m", "hf_prune", "push", client.scratch / "cut", "user/command", "--private", "--json"]
    done = run(list(map(str, code)), client, tmp_path)
    assert done.returncode == 0, done.stderr
    _, commit = commits(client, "user/command")
    assert json.loads(done.stdout)["commit"] == commit.sha and client.repos["user/command"].private
    assert cli.main(["push", str(client.scratch / "cut"), "user/../x"]) == 1
    assert "can't be the name" in capsys.readouterr().err
