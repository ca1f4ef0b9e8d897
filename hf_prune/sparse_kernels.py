"""Run weights pruned to 2:4 on the sparse tensor cores of NVIDIA GPUs."""

import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .report import PruningReport
from .timing import Latency, measure_latency


def accelerate_sparse(
    model: PreTrainedModel, report: PruningReport | None = None, *, batch_size: int = 8, sequence_length: int = 128
) -> dict[str, Latency]:
    """Put the 2:4 weights of a model into torch's semi-structured form, in place, and measure what it gains.

    Such weights hold half of the values and have kernels of their own. They are for inference: save the model before,
    it can't be saved or trained afterwards.

    Args:
        model (`PreTrainedModel`): A model in float16 or bfloat16 on a CUDA device, whose `nn.Linear` were pruned with
            `pattern="2:4"`. Those that were not, or whose shape the kernels don't take, stay as they are.
        report ([`PruningReport`], *optional*): Where to note the times.
        batch_size, sequence_length (`int`, *optional*, default to 8 and 128): Of the forward passes that are timed.

    Returns:
        `dict[str, Latency]`: One forward pass, `"dense"` and `"sparse"`. Small layers and batches may get slower.

    Raises:
        UnsupportedModelError: The model is not on a GPU that has the kernels, in another dtype, or has no 2:4 weights.
            It is unchanged.
        ConfigError: A size is out of range. The model is unchanged.

    Examples:
        ```python
        >>> model = AutoModelForCausalLM.from_pretrained("pruned-2-4", dtype=torch.bfloat16, device_map="cuda")
        >>> times = hf_prune.accelerate_sparse(model)
        >>> times["dense"].p50_ms / times["sparse"].p50_ms  # the speed-up
        ```
    """
    name, device = type(model).__name__, model.device
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        raise UnsupportedModelError(
            f"{name} is on {device}: torch has 2:4 kernels for NVIDIA GPUs of compute capability 8.0 or more. "
            "Elsewhere zeros give no speed-up."
        )
    if model.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedModelError(f"{name} is in {model.dtype}: 2:4 kernels want model.to(torch.bfloat16).")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and is_two_of_four(layer.weight)]
    sparse: list[tuple[nn.Linear, SparseSemiStructuredTensor]] = []
    refused = ""
    for layer in layers:
        try:
            sparse.append((layer, to_sparse_semi_structured(layer.weight.detach().contiguous())))
        except RuntimeError as error:  # of its shape
            refused = f" torch refused {len(layers) - len(sparse)} that are: {error}"
    if not sparse:
        raise UnsupportedModelError(
            f"{name} has no nn.Linear that runs as 2:4: prune it with WandaConfig(pattern='2:4').{refused}"
        )

    def measured() -> Latency:
        return measure_latency({name: model}, batch_size, sequence_length)[name]

    times = {"dense": measured()}
    for layer, weight in sparse:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    times["sparse"] = measured()
    if report is not None:
        after = times["sparse"]
        report.latency = {
            "before": times["dense"].p50_ms,
            "after": after.p50_ms,
            "where": f"{torch.cuda.get_device_name(device)}, batch {batch_size}, {sequence_length} tokens, "
            f"{after.dtype}, 2:4 kernels for {len(sparse)} matrices",
        }
    return times


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of every four consecutive inputs of an output, (outputs, inputs), at least two weights are zero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).view(-1, 4).sum(1) <= 2).all())
