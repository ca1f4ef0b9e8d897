"""Equal widths in every layer: what is saved is a stock checkpoint, for plain transformers and for what reads GGUF."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import tiny_batch, tiny_model
from transformers import AutoModelForCausalLM

import hf_prune
from hf_prune import MagnitudeConfig

LOAD = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps({"logits": logits.tolist(), "hf_prune": "hf_prune" in sys.modules}))
"""


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def uniform(request, tmp_path_factory):
    """A model of the Llama type with fewer KV groups and neurons in every layer, and the folder it is saved in."""
    model = tiny_model(request.param)
    config = MagnitudeConfig(budget={"params": 0.75}, allocation="uniform", multiple_of=8)
    result = hf_prune.prune(model, config)
    hf_prune.shrink(model, result.mask)
    folder = tmp_path_factory.mktemp(request.param)
    hf_prune.save_pretrained(model, folder, report=result.report)
    return model, folder


def test_the_config_is_a_stock_one(uniform):
    model, folder = uniform
    config = json.loads((folder / "config.json").read_text())
    assert "hf_prune" not in config and "auto_map" not in config
    assert config["head_dim"] == 8  # said, for heads * head_dim is no longer the hidden size
    assert config["num_attention_heads"] * config["head_dim"] < config["hidden_size"]
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["intermediate_size"] == model.model.layers[0].mlp.up_proj.out_features < 64


def test_it_loads_where_hf_prune_is_not_installed(uniform, tmp_path):
    model, folder = uniform
    ids = tiny_batch("llama", 2, 7)["input_ids"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", LOAD, str(folder), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["hf_prune"]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["logits"]), model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def write_gguf(folder, path) -> None:
    """As the converters do: fields from the stock config, tensors under their names in the format."""
    gguf = pytest.importorskip("gguf")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if count := heads.get(module.rpartition(".")[2]):  # the format pairs the two halves of each head
            half = tensor.shape[0] // count // 2
            tensor = tensor.view(count, 2, half, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{names.get_name(module)}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("uniform", ["llama"], indirect=True)
def test_it_survives_gguf(uniform, tmp_path):
    model, folder = uniform
    write_gguf(folder, tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert again.config.head_dim == model.config.head_dim
    batch = tiny_batch("llama", 2, 7)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
