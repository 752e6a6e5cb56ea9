"""Compose presets of `conf/method` as the command line does, but from Python."""

import copy
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from fp4dit.api.families import find_lower_tokens, find_model_option
from fp4dit.models.adapter import find_guidance_name
from fp4dit.models.generic import list_transformers
from fp4dit.models.hub_files import TRANSFORMER
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.quantization.roles import resolve_roles
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.data_free import explain_data_need
from fp4dit.utils.errors import UserError
from pipelines.cli.errors import STAGED_FILE, explain_error
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import list_options, register_resolvers, suggest_names
from pipelines.config.validation import check_override_types
from pipelines.planning.instantiate import instantiate_node

DEFAULT_TEXT_ENCODER = "e2m1_g64"


@dataclass(frozen=True)
class Preset:
    """A method with its overrides, composed for one kind of model.

    Attributes:
        method: Name of the preset, or the file that it was read from.
        config: The whole config of a run.

    Example:
        >>> preset = compose_preset("nvfp4_rtn", model="pixart_sigma")
        >>> preset.weight[0].quantizer.format.name
        'e2m1'
    """

    method: str
    config: DictConfig

    @cached_property
    def weight(self) -> list[Rule]:
        """Rules for the weights of the transformer."""
        return list(self._instantiate("weight"))

    @cached_property
    def activation(self) -> list[Rule]:
        """Rules for the activations of the transformer."""
        return list(self._instantiate("activation"))

    @cached_property
    def text_encoder(self) -> list[Rule]:
        """Rules for the weights of text encoders, which only an export or a caller asks for."""
        return list(self._instantiate("text_encoder"))

    @cached_property
    def rounding(self) -> RoundingMethod:
        """Method by which the weights of the transformer are rounded."""
        return self._instantiate("rounding")

    @cached_property
    def source(self) -> PretrainedSource:
        """Source of models of this kind."""
        return self._instantiate("model")

    @property
    def data_need(self) -> str | None:
        """Why the preset needs calibration calls, as a clause; None if it needs no data."""
        stage = self.config.stages.generate.needs.weights
        if stage != "reconstruct":
            return f"its stage {stage} trains the rounded weights"
        return explain_data_need(self.weight, self.activation, self.rounding)

    def fit(self, model: nn.Module) -> "Preset":
        """Return the preset with rules for the names of a model's layers in place of their roles.

        Args:
            model: The transformer before it is quantized, possibly on the meta device.
        """
        fitted = Preset(self.method, self.config)
        for name in ("weight", "activation"):
            fitted.__dict__[name] = resolve_roles(getattr(self, name), model)
        return fitted

    def choose_transformers(self, components: Iterable[str]) -> dict[str, "Preset"]:
        """Return a preset for each transformer of a pipeline that is quantized, by its name.

        These are all transformers, unless the option `model.transformer` chooses one.

        Args:
            components: The names of the components that the pipeline has.
        """
        names = list_transformers(components, self.config.model.get(TRANSFORMER))
        if len(names) == 1:
            return {self.source.component: self}
        presets = {}
        for name in names:
            config = copy.deepcopy(self.config)
            config.model.transformer = name
            presets[name] = Preset(self.method, config)
        return presets

    def _instantiate(self, group: str) -> Any:
        with explain_config_errors():
            return instantiate_node(group, self.config[group])


def compose_preset(
    method: str, overrides: Sequence[str] = (), model: str = "generic", **defaults: Any
) -> Preset:
    """Compose a preset.

    Args:
        method: Name of a file of `conf/method`, or the path of such a file.
        overrides: Overrides in the grammar of the command line, such as `weight.format=e2m2`.
        model: Name of a file of `conf/model`, which `model=` in the overrides replaces.
        defaults: Values of options that are not overridden, with `__` in place of dots.

    Raises:
        UserError: if there is no such method, or an override is not valid.

    Example:
        >>> compose_preset("gptq", ["rounding.damping=0.02"], seed=1).config.seed
        1
    """
    check_overrides(overrides)
    register_resolvers()
    with stage_method_file(method) as choice, explain_config_errors():
        defaults |= {"model": model, "text_encoder": DEFAULT_TEXT_ENCODER}
        texts = [*choice, *list_defaults(overrides, **defaults), *overrides]
        config = compose_config("run", texts)
        if overrides:
            check_override_types(config, texts)
    return Preset(method, config)


def compose_for_pipeline(
    pipe: DiffusionPipeline,
    method: str,
    overrides: Sequence[str],
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Preset:
    """Compose a preset for a pipeline in memory.

    Args:
        pipe: The pipeline, whose class chooses the file of `conf/model`. If its tokenizer takes
            fewer tokens than that file says, prompts have this number of tokens.
        method: Name or file of the preset.
        overrides: Overrides in the grammar of the command line.
        steps: Denoising steps while calibrating; None for the default of the pipeline's call.
        guidance: Guidance scale while calibrating; None for the default of the pipeline's call.
        seed: Seed of the calibration and of the rounding.

    Raises:
        UserError: as `compose_preset` does.
    """
    parameters = signature(type(pipe).__call__).parameters
    if steps is None and "num_inference_steps" in parameters:
        steps = parameters["num_inference_steps"].default
    name = find_guidance_name(parameters)
    if guidance is None and name is not None:
        guidance = parameters[name].default
    class_name, tokenizer = type(pipe).__name__, pipe.components.get("tokenizer")
    limit = getattr(tokenizer, "model_max_length", None)
    preset = compose_preset(
        method,
        overrides,
        find_model_option(class_name),
        model__tokens=find_lower_tokens(class_name, limit, overrides),
        generation__steps=steps,
        generation__guidance=guidance,
        seed=seed,
    )
    preset.config.model.path = str(pipe.name_or_path or class_name)
    return preset


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise a UserError if overrides are a single string, or choose the method."""
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: give a list, such as [{overrides!r}]")
    for text in overrides:
        if text.startswith(("method=", "experiment=")):
            raise UserError(f"{text}: give the method as the argument `method`")


def list_defaults(overrides: Sequence[str], **defaults: Any) -> list[str]:
    """Return overrides that set options to values, without the options that are overridden."""
    keys = {text.lstrip("+~").partition("=")[0] for text in overrides}
    texts = []
    for name, value in defaults.items():
        key = name.replace("__", ".")
        if value is not None and key not in keys:
            texts.append(f"{key}={value}")
    return texts


@contextmanager
def stage_method_file(method: str) -> Iterator[list[str]]:
    """Context manager: yield the overrides that choose a preset by its name or its file.

    A file is copied to a folder of the search path while the config is composed, because Hydra
    looks for the options of a group in folders of its name.

    Raises:
        UserError: if there is no such preset.
    """
    if method in list_options("method"):
        yield [f"method={method}"]
        return
    path = Path(method).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        hint = suggest_names(method, list_options("method"))
        raise UserError(f"method={method}: there is no such preset; {hint}")
    if not path.is_file():
        raise UserError(f"method={method}: there is no such file")
    if "@package _global_" not in path.read_text():
        raise UserError(f"method={method}: its first line must be `# @package _global_`")
    with tempfile.TemporaryDirectory() as folder:
        name = f"{STAGED_FILE}{path.stem}"  # Hydra would prefer a preset of the file's own name
        (Path(folder) / "method").mkdir()
        shutil.copy(path, Path(folder) / "method" / f"{name}.yaml")
        yield [f"hydra.searchpath=[file://{folder}]", f"method={name}"]


@contextmanager
def explain_config_errors() -> Iterator[None]:
    """Context manager: turn errors of Hydra and OmegaConf into UserErrors."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        message = explain_error(error)
        if message is None:
            raise
        raise UserError(message) from error
