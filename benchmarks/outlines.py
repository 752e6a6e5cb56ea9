"""Write the outlines of the models of conf/model, from which tables are made without diffusers.

    python -m benchmarks.outlines

Run it after a change of conf/model, of the configs in fp4dit/models/published, or of diffusers. A
test compares the files with the models.
"""

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from benchmarks.published import is_traced
from fp4dit.estimate.footprint import measure_activation_shapes
from fp4dit.models.hub_files import TRANSFORMER_CONFIG, read_config
from fp4dit.models.outline import OUTLINES, ModelOutline, hash_config, select_shape_options
from fp4dit.quantization.rules import find_layers
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import list_options, register_resolvers
from pipelines.planning.instantiate import instantiate_node

# Roles of layers, which `generic` and what is based on it have, are found in the code of a model.
# The weights of the emoji model are not in this repository.
OPTIONS = [name for name in list_options("model") if name != "emoji" and not is_traced(name)]


def make_outline(option: str) -> ModelOutline:
    """Make the outline of a model of conf/model, without its weights."""
    register_resolvers()
    config = compose_config("run", [f"model={option}", "weight=e2m1_channel"])
    model: Any = OmegaConf.to_container(config.model)
    source = instantiate_node("model", config.model)
    transformer = source.build_on_meta().transformer
    layers: dict[str, Any] = {
        name: layer.weight.shape for name, layer in find_layers(transformer).items()
    }
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    *_, rule = instantiate_node("weight", config.weight)
    return ModelOutline(
        target=model["_target_"],
        options=select_shape_options(model),
        config_hash=hash_config(read_config(source.validate_path(), TRANSFORMER_CONFIG)),
        layers=layers,
        num_other_parameters=num_parameters - sum(shape.numel() for shape in layers.values()),
        activations=measure_activation_shapes(source.build_on_meta(), [replace(rule, match="*")]),
    )


if __name__ == "__main__":
    for option in OPTIONS:
        make_outline(option).write(OUTLINES / f"{option}.json")
