"""Round the linear layers of a transformer block with the packages that calibration is compared to.

Each function has the arguments of our side: a block, which is changed in place, its data and a
number of steps. All round to INT4 in groups of 128 with a zero point and min-max ranges. The
packages are no dependency of this project; a function imports its own when it is called.
"""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.utils.calls import Call

GROUP, BITS, BATCH = 128, 4, 16
LEARNING_RATE = 1e-2  # of AdaRound's Adam, on both sides


class CallsToBlock(nn.Module):
    """A model that consists of one block and takes a call of it, as brevitas' trainer requires.

    Args:
        block: The block.

    Example:
        >>> output = CallsToBlock(block)(call)
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, call: Call) -> Tensor:
        return call(self.block)


def iterate_calls(data: UnitDataset) -> Iterator[Call]:
    """Yield the calls of the training rows, in batches."""
    for index in data.train_rows.split(BATCH):
        yield data.make_call(index, "cpu")


def tune_with_auto_round(block: nn.Module, data: UnitDataset, steps: int) -> None:
    """Round with the SignRound of auto-round, in bf16 as it computes on a CPU."""
    from auto_round.algorithms.block_runner import BlockForwardRunner
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    options = {"bits": BITS, "group_size": GROUP, "sym": False, "data_type": "int", "act_bits": 16}
    config = SignRoundConfig(iters=steps, **options)
    config.finalize_scheme()
    for layer in block.modules():
        if isinstance(layer, nn.Linear):
            vars(layer).update(options, scale_dtype=torch.float16, act_dynamic=True)
    half = {"amp": True, "amp_dtype": torch.bfloat16}
    quantizer = SignRoundQuantizer(config)
    quantizer.bind(make_orchestrator(block, config, half))  # pyright: ignore[reportArgumentType]
    runner = BlockForwardRunner(batch_size=BATCH, enable_torch_compile=False, **half)
    quantizer.bind_block_forward_runner(runner)  # pyright: ignore[reportArgumentType]
    random.seed(0)
    call = data.make_call(data.train_rows, "cpu")
    block.bfloat16()
    others = {name: list(value.bfloat16().split(1)) for name, value in call.kwargs.items()}
    [targets] = data.select(data.train_rows).target
    inputs, outputs = (list(x.bfloat16().split(1)) for x in (call.args[0], targets))
    place: Any = SimpleNamespace(block_index=0, block_cnt=2, block_name="")
    quantizer.quantize_block(block, inputs, others, outputs, None, place)
    block.float()


def make_orchestrator(block: nn.Module, config: Any, half: dict[str, Any]) -> SimpleNamespace:
    """Return what auto-round's quantizer reads of the object that runs it on a whole model.

    Its compilation is switched off: here it takes longer than it saves.
    """
    compress = SimpleNamespace(
        enable_torch_compile=False,
        low_gpu_mem_usage=False,
        cache_device=torch.device("cpu"),
        clear_memory=lambda: None,
    )
    return SimpleNamespace(
        model_context=SimpleNamespace(is_diffusion=False, model=block, **half),
        compress_context=compress,
        calibration_context=SimpleNamespace(batch_size=BATCH, batch_dim=0),
        scale_dtype=torch.float16,
        scheme_context=config.scheme,
    )


def insert_brevitas_layers_(block: nn.Module, data: UnitDataset) -> None:
    """Replace the linear layers by those of brevitas, and let them choose their scales."""
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant.shifted_scaled_int import ShiftedUint8WeightGroupQuantFloat

    options = {
        "weight_quant": ShiftedUint8WeightGroupQuantFloat,
        "weight_bit_width": BITS,
        "weight_group_size": GROUP,
        "weight_group_dim": 1,
    }
    layerwise_quantize(block, compute_layer_map={nn.Linear: (qnn.QuantLinear, options)})
    block.eval()
    with torch.no_grad():
        next(iterate_calls(data))(block)


def round_with_brevitas_gptq(
    block: nn.Module, data: UnitDataset, steps: int, in_order: bool = False
) -> None:
    """Round with brevitas' GPTQ, which has no steps.

    Args:
        in_order: whether the columns with the largest activations come first.
    """
    from brevitas.graph.gptq import gptq_mode

    insert_brevitas_layers_(block, data)
    with torch.no_grad(), gptq_mode(block, create_weight_orig=False, act_order=in_order) as mode:
        for _ in range(mode.num_layers):
            for call in iterate_calls(data):
                call(mode.model)
            mode.update()


def tune_with_brevitas_signround(block: nn.Module, data: UnitDataset, steps: int) -> None:
    """Round with brevitas' SignRound, which leaves the scales as they are."""
    from brevitas_examples.common.learned_round.learned_round_args import LRSchedulerArgs

    decay = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": steps}
    optimizer = {
        "optimizer_cls": "SignSGD",
        "lr": 1 / steps,
        "lr_scheduler_args": LRSchedulerArgs("LinearLR", decay),
    }
    train_brevitas(block, data, steps, "identity", optimizer, {"mse": {}}, by_layer=False)


def tune_with_brevitas_adaround(block: nn.Module, data: UnitDataset, steps: int) -> None:
    """Round with brevitas' AdaRound, layer by layer as its rounding loss requires."""
    losses = {"mse": {}, "round_reg": {"max_count": steps}}
    optimizer = {"optimizer_cls": "Adam", "lr": LEARNING_RATE}
    train_brevitas(block, data, steps, "hard_sigmoid", optimizer, losses, by_layer=True)


def train_brevitas(
    block: nn.Module,
    data: UnitDataset,
    steps: int,
    rounding: str,
    optimizer: dict[str, Any],
    losses: dict[str, dict],
    by_layer: bool,
) -> None:
    """Train roundings with the trainer of brevitas' examples, in bf16.

    Args:
        rounding: brevitas' name of the parametrization.
        optimizer: arguments of its `OptimizerArgs`.
        losses: arguments of each loss, by brevitas' name of it.
        by_layer: whether layers are trained one after another, instead of the whole block.
    """
    import brevitas.nn as qnn
    from brevitas_examples.common.learned_round import learned_round_args as arguments
    from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer
    from brevitas_examples.llm.llm_quant.learned_round_utils import CacheLLM, llm_block_forward

    torch.manual_seed(0)
    insert_brevitas_layers_(block, data)
    handler = arguments.LearnedRoundArgs(rounding, {})
    training = arguments.TrainingArgs(
        [arguments.OptimizerArgs("learned_round", optimizer_kwargs={}, **optimizer)],
        batch_size=BATCH,
        iters=steps,
        losses_args=[arguments.LossArgs(name, options) for name, options in losses.items()],
        use_best_model=not by_layer,
        use_amp=True,
        amp_dtype="bfloat16",
    )
    config = arguments.TrainerConfig(training, [arguments.HandlerSpec("learned_round", handler)])

    def list_parts(model: Any) -> list[nn.Module]:
        layers = [layer for layer in model.modules() if isinstance(layer, qnn.QuantLinear)]
        return layers if by_layer else [model.block]

    LearnedRoundTrainer(config).train(
        CallsToBlock(block),
        CallsToBlock.forward,  # pyright: ignore[reportArgumentType]
        llm_block_forward,
        list(iterate_calls(data)),  # pyright: ignore[reportArgumentType]
        CacheLLM(),
        list_parts,
    )
