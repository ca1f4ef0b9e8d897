"""Modules that have lost all their heads or inputs.

Not all of them run so in transformers (they reshape by the number of heads), fewer are exported to ONNX (whose Reshape
knows no empty tensors), and all spend time on nothing.
"""

from typing import Any


class Emptied:
    """A module that has got a forward pass of ours, see [`run_empty`]."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle and deepcopy remake it from that of transformers.
        return _remade, (type(self).__bases__[1],), self.__dict__


class NoInputs(Emptied):
    """A Conv1D without inputs: it returns its bias."""

    def forward(self: Any, x: Any) -> Any:
        return x @ self.weight + self.bias


class NoHeads(Emptied):
    """An attention module without heads: it returns what its output projection makes of nothing.

    Attributes:
        ends (`dict`): Classes of transformers, and the modules through which the output of each goes.
    """

    ends: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(("BertSelfAttention", "ElectraSelfAttention", "RobertaSelfAttention"), ()),
        "DisentangledSelfAttention": (),
        "DistilBertSelfAttention": ("out_lin",),
        "GPT2Attention": ("c_proj", "resid_dropout"),
        "GPTNeoXAttention": ("dense",),
        "ModernBertAttention": ("Wo", "out_drop"),
        **dict.fromkeys(("LlamaAttention", "MistralAttention", "Phi3Attention", "ViTAttention"), ("o_proj",)),
        **dict.fromkeys(("Gemma2Attention", "Gemma3Attention", "Qwen2Attention", "Qwen3Attention"), ("o_proj",)),
        **dict.fromkeys(("BartAttention", "MarianAttention", "OPTAttention", "WhisperAttention"), ("out_proj",)),
    }

    def forward(
        self: Any,
        hidden_states: Any,
        *args: Any,
        key_value_states: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> Any:
        output, keys = hidden_states[..., :0], hidden_states if key_value_states is None else key_value_states
        batch, length = output.shape[:2]
        if self.training:  # DDP waits for the gradients of all parameters
            output = output + 0 * sum(p.sum() for p in self.parameters())
        cache = layer_past if past_key_values is None else past_key_values
        if cache is not None and key_value_states is None:  # that of layer 0 says how many tokens there have been
            nothing = hidden_states.new_zeros(batch, 0, length, 1)
            cache = getattr(cache, "self_attention_cache", cache)
            keys = cache.update(nothing, nothing, self.layer_idx)[0].transpose(1, 2)
        for name in self.ends[type(self).__name__]:
            output = getattr(self, name)(output)
        return output, hidden_states.new_zeros(batch, 0, length, keys.shape[1])


def _is_empty(module: Any) -> bool:
    ends = NoHeads.ends.get(type(module).__name__)
    if ends is None:
        return type(module).__name__ == "Conv1D" and module.nx == 0
    if not ends:
        return bool(module.num_attention_heads == 0)
    return 0 in getattr(module, ends[0]).weight.shape


def _emptied(cls: Any) -> Any:
    base = NoHeads if cls.__name__ in NoHeads.ends else NoInputs
    return type(cls.__name__, (base, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _remade(cls: Any) -> Any:
    emptied = _emptied(cls)
    return emptied.__new__(emptied)


def run_empty(module: Any) -> None:
    """Let a module that has lost all its heads or inputs run, and take no time. Does nothing with others, or twice."""
    if not isinstance(module, Emptied) and _is_empty(module):
        module.__class__ = _emptied(type(module))
