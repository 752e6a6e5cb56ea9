"""Save a quantized diffusers pipeline in the format of another library."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from fp4dit.api.targets import load_export_format
from fp4dit.packed.targets.conversion import require_packed
from fp4dit.packed.targets.folders import require_new_folder


def export(
    pipe: DiffusionPipeline,
    folder: Path | str,
    format: str,
    *,
    dense: Sequence[str] = (),
    dtype: str | None = None,
) -> Sequence[str]:
    """Save a quantized pipeline so that others load it without fp4dit, with exactly its weights.

    The `README.md` in the folder says how it is loaded. Quantized inputs of layers are described
    there, because few formats hold them.

    Args:
        pipe: A pipeline whose transformer `fp4dit.quantize` has quantized.
        folder: A new folder.
        format: Name of a file of `conf/export_format`, such as `sdnq`.
        dense: Patterns of the names of quantized layers to save as plain weights.
        dtype: Dtype in which the weights are exact and everything else is saved, such as
            `bfloat16`; the default is that of the pipeline.

    Returns:
        Notes: what is exact, and what readers do otherwise.

    Raises:
        UserError: if the transformer is not quantized, or has layers that the format cannot hold
            exactly. The message names them, with the reasons and the overrides that would fit.

    Example:
        >>> fp4dit.quantize(pipe, "rtn_fp4")
        >>> fp4dit.export(pipe, "my-model-sdnq", "sdnq")
    """
    new = require_new_folder(str(folder))
    transformer = pipe.transformer  # pyright: ignore[reportAttributeAccessIssue]
    config = getattr(transformer.config, "quantization_config", None)
    require_packed(type(transformer).__name__, config.to_dict() if config else None)
    convert = load_export_format(format)
    new.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=new.parent, prefix=f".{new.name}.") as packed:
        pipe.save_pretrained(packed)
        return convert(packed, str(new), dense=dense, dtype=dtype)
