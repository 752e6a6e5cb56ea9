"""Stable names of everything that a stored result or a packed checkpoint can depend on.

A stage's key and the JSON of a packed layer contain these tags, never the path or the name of a
class. A class can therefore move or be renamed without a stored result being lost: change its path
here, and leave its tag. A tag is never given to something else.

To list a new class, add a line with a tag and the import path: to `CHECKPOINT_KINDS` if a packed
layer may contain it, else to `OTHER_KINDS`. A class that is not listed, such as one of your own, is
identified by its import path, and cannot be exported.

A `_target_` in YAML must be the listed path letter for letter, because `replace_paths` compares
them as text. With `fp4dit.metrics.foo.Foo` in YAML and `fp4dit.metrics.Foo` here, the class has no
tag. Some tags keep older names than the code, because stored results contain them.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

# The classes and functions that a packed checkpoint may contain. A checkpoint may come from
# anybody, and reading it constructs these: each has to be safe with any values of its fields.
CHECKPOINT_KINDS: dict[str, str] = {
    # Number formats
    "number_format": "fp4dit.numerics.NumberFormat",
    "codebook": "fp4dit.numerics.Codebook",
    "shared_mantissa": "fp4dit.numerics.SharedMantissa",
    "format_selection": "fp4dit.numerics.FormatSelection",
    "least_error": "fp4dit.numerics.LeastError",
    "range_ratio": "fp4dit.numerics.RangeRatio",
    # Scales
    "quantizer": "fp4dit.numerics.Quantizer",
    "per_tensor": "fp4dit.numerics.PerTensor",
    "per_channel": "fp4dit.numerics.PerChannel",
    "per_token": "fp4dit.numerics.PerToken",
    "per_head": "fp4dit.numerics.PerHead",
    "per_group": "fp4dit.numerics.PerGroup",
    "per_split": "fp4dit.numerics.PerSplit",
    "per_input_channel": "fp4dit.numerics.PerInputChannel",
    "absmax": "fp4dit.numerics.AbsMax",
    "absmax_two_sided": "fp4dit.numerics.TwoSidedAbsMax",
    "minmax": "fp4dit.numerics.MinMax",
    "offset_range": "fp4dit.numerics.OffsetRange",
    "standard_deviations": "fp4dit.numerics.StandardDeviations",
    "root_mean_squares": "fp4dit.numerics.RootMeanSquares",
    "percentile": "fp4dit.numerics.Percentile",
    "quantile": "fp4dit.numerics.Quantile",
    "min_error": "fp4dit.numerics.MinError",
    "least_error_clip": "fp4dit.numerics.LeastErrorClip",
    "best_of": "fp4dit.numerics.BestOf",
    "part_scales": "fp4dit.numerics.PartScales",
    "pre_shift": "fp4dit.numerics.PreShift",
    "largest_value": "fp4dit.numerics.max_magnitude",
    "e8m0": "fp4dit.numerics.E8M0Scale",
    "e8m0_ceiling": "fp4dit.numerics.CeilRatioExponent",
    "nvfp4": "fp4dit.numerics.NVFP4Scale",
    "nvfp4_power_of_two": "fp4dit.numerics.PowerOfTwoNVFP4Scale",
    "round_below": "fp4dit.numerics.floor_ratio_exponent",
    "round_ceil": "fp4dit.numerics.ceil_exponent",
    "round_even": "fp4dit.numerics.even_exponent",
    "round_floor": "fp4dit.numerics.floor_exponent",
    "round_nearest": "fp4dit.numerics.nearest_ratio_exponent",
    # Transforms
    "hadamard": "fp4dit.transforms.Hadamard",
    "regular_hadamard": "fp4dit.transforms.RegularHadamard",
    "smoothing": "fp4dit.transforms.Smoothing",
    "smoothing_search": "fp4dit.transforms.SmoothingSearch",
    "channel_max": "fp4dit.transforms.ChannelMax",
    "moving_max": "fp4dit.transforms.MovingAverageMax",
    "moving_batch_max": "fp4dit.transforms.MovingAverageBatchMax",
    "salience": "fp4dit.transforms.SalienceWeightedMax",
    "low_rank": "fp4dit.transforms.LowRank",
    "low_rank_bf16": "fp4dit.transforms.LowRankBF16",
    "shift": "fp4dit.transforms.Shift",
    "low_rank_refined": "fp4dit.transforms.RefinedLowRank",
    "low_rank_quantized": "fp4dit.transforms.QuantizedLowRank",
    "principal_components": "fp4dit.transforms.PrincipalComponents",
    "token_clip": "fp4dit.transforms.TokenClipSearch",
    "smoothing_search_power_of_two": "fp4dit.transforms.PowerOfTwoSmoothingSearch",
    # Rules and observers
    "rule": "fp4dit.quantization.Rule",
    "sample": "fp4dit.quantization.SampleObserver",
    "moving_range": "fp4dit.quantization.MovingAverageMinMaxObserver",
    "moving_part_range": "fp4dit.quantization.MovingAveragePartsObserver",
    "channel_range": "fp4dit.quantization.PerChannelMinMaxObserver",
    "sage": "fp4dit.quantization.SageAttention",
    # The packed checkpoint
    "packed_layout": "fp4dit.packed.encoding.layout.Layout",
    "packed_weights": "fp4dit.packed.model.WeightGroup",
    "packed_inputs": "fp4dit.packed.model.InputGroup",
    "packed_description": "fp4dit.packed.model.ModelDescription",
    "encoding_uint": "fp4dit.packed.encoding.qparams.UIntEncoding",
    "encoding_e8m0": "fp4dit.packed.encoding.qparams.E8M0Encoding",
    "encoding_e4m3": "fp4dit.packed.encoding.qparams.E4M3Encoding",
    "encoding_signed_e4m3": "fp4dit.packed.encoding.qparams.SignedE4M3Encoding",
    "encoding_float": "fp4dit.packed.encoding.qparams.FloatEncoding",
}

OTHER_KINDS: dict[str, str] = {
    # Numerics and rules
    "format": "fp4dit.numerics.parse_format",
    "per_block_format": "fp4dit.numerics.PerBlockFormat",
    "weight_rules": "fp4dit.quantization.weight_rules",
    "activation_rules": "fp4dit.quantization.activation_rules",
    # Calibration
    "noise_at_index": "fp4dit.calibration.noise_at_index",
    # Generation
    "first_block_cache": "fp4dit.evaluation.FirstBlockCache",
    "layer_output_cache": "fp4dit.evaluation.LayerOutputCache",
    # Rounding
    "round_to_nearest": "fp4dit.rounding.RoundToNearest",
    "stochastic": "fp4dit.numerics.StochasticRounding",
    "learned_rounding": "fp4dit.rounding.LearnedRounding",
    "layerwise_reconstruction": "fp4dit.rounding.LayerwiseReconstruction",
    "staged_reconstruction": "fp4dit.rounding.StagedReconstruction",
    "fixed_weight": "fp4dit.rounding.FixedWeight",
    "input_steps": "fp4dit.rounding.InputSteps",
    "relative_mse": "fp4dit.rounding.RelativeMSE",
    "timestep_weights": "fp4dit.rounding.TimestepWeights",
    "adam": "fp4dit.rounding.fused_adam",
    # `fp4dit.rounding.adaround` is the module, which shadows the function of its name.
    "adaround": "fp4dit.rounding.adaround.adaround",
    "adaround_scale_aware": "fp4dit.rounding.adaround_scale_aware",
    "adaround_scale_aware_normalized": "fp4dit.rounding.adaround_scale_aware_normalized",
    "gptq": "fp4dit.rounding.GPTQ",
    "largest_first": "fp4dit.rounding.activation_order",
    "imatrix": "fp4dit.rounding.ImportanceMatrix",
    "output_search": "fp4dit.rounding.OutputSearch",
    "linear_grid": "fp4dit.rounding.LinearGrid",
    "bias_multiples": "fp4dit.rounding.BiasMultiples",
    "signround": "fp4dit.rounding.SignRound",
    "sign_sgd": "fp4dit.rounding.SignSGD",
    "linear_decay": "fp4dit.rounding.linear_decay",
    "shift_in_ulp": "fp4dit.rounding.shift_in_ulp",
    "scale_in_format": "fp4dit.rounding.round_scale_to_format",
    "scale_in_format_per_tensor": "fp4dit.rounding.round_scale_to_tensor_units",
    "scale_power_of_two": "fp4dit.rounding.round_scale_to_power_of_two",
    "finetune": "fp4dit.rounding.Finetuning",
    "latent_weight": "fp4dit.rounding.LatentWeight",
    # Training in few bits
    "train_rule": "fp4dit.lowbit_training.TrainRule",
    "train_rules": "fp4dit.lowbit_training.train_rules",
    "train_recipe": "fp4dit.lowbit_training.MatmulRecipe",
    "operand_absmax": "fp4dit.lowbit_training.absmax_quantizer",
    "operand_mxfp8": "fp4dit.lowbit_training.mxfp8_quantizer",
    "operand_quest": "fp4dit.lowbit_training.quest_quantizer",
    # Formats of other libraries
    "export_folder": "fp4dit.packed.targets.conversion.export_folder",
    "import_folder": "fp4dit.packed.targets.conversion.import_folder",
    "target_sdnq": "fp4dit.packed.targets.sdnq.SDNQ",
    "target_auto_round": "fp4dit.packed.targets.auto_round.AutoRound",
    "target_bfl": "fp4dit.packed.targets.bfl.BFL",
    "target_nunchaku_lite": "fp4dit.packed.targets.nunchaku.NunchakuLite",
    "target_torchao": "fp4dit.packed.targets.torchao.TorchAO",
    "target_comfyui": "fp4dit.packed.targets.comfyui.ComfyUI",
    "target_gguf": "fp4dit.packed.targets.gguf.GGUF",
    "target_compressed_tensors": "fp4dit.packed.targets.compressed_tensors.CompressedTensors",
    # Models
    "pixart": "fp4dit.models.PixArt",
    "hunyuan_dit": "fp4dit.models.Hunyuan",
    "dit": "fp4dit.models.DiT",
    "generic": "fp4dit.models.Generic",
    # Prompts
    "prompts_file": "fp4dit.data.load_prompts",
    "prompts_coco": "fp4dit.data.load_coco_prompts",
    "prompts_grouped": "fp4dit.data.combine_sets",
    "prompts_classes": "fp4dit.data.draw_class_prompts",
    # Metrics
    "psnr": "fp4dit.metrics.PSNR",
    "ssim": "fp4dit.metrics.SSIM",
    "lpips": "fp4dit.metrics.LPIPS",
    "flicker": "fp4dit.metrics.Flicker",
    "clip_score": "fp4dit.metrics.CLIPScore",
    "clip_score_b32": "fp4dit.metrics.CLIPScoreB32",
    "clip_score_l14": "fp4dit.metrics.CLIPScoreL14",
    "clip_image": "fp4dit.metrics.CLIPImageSimilarity",
    "clip_features": "fp4dit.metrics.CLIPFeatures",
    "inception_features": "fp4dit.metrics.InceptionFeatures",
    "inception_score": "fp4dit.metrics.InceptionScore",
    "fid": "fp4dit.metrics.FID",
    "sfid": "fp4dit.metrics.SpatialFID",
    "kid": "fp4dit.metrics.KID",
    "cmmd": "fp4dit.metrics.CMMD",
    "precision": "fp4dit.metrics.Precision",
    "recall": "fp4dit.metrics.Recall",
    "hps_v2_0": "fp4dit.metrics.HPSv20",
    "hps_v2_1": "fp4dit.metrics.HPSv21",
    "pickscore": "fp4dit.metrics.PickScore",
    "image_reward": "fp4dit.metrics.ImageReward",
    # Worlds and their training
    "shapes_world": "fp4dit.worlds.ShapesWorld",
    "emoji_world": "fp4dit.worlds.EmojiWorld",
    "prompts_world": "fp4dit.worlds.draw_captions",
    "oracle_accuracy": "fp4dit.worlds.OracleAccuracy",
    "scene_data": "fp4dit.pretraining.SceneData",
    "scenes": "fp4dit.pretraining.SceneStream",
    "pretraining": "fp4dit.pretraining.train_transformer",
}

KINDS: dict[str, str] = {**CHECKPOINT_KINDS, **OTHER_KINDS}


@cache
def import_kind(tag: str) -> Any:
    """Import the class or function that `tag` names.

    Raises:
        KeyError: if there is no such tag.
    """
    module, _, name = KINDS[tag].rpartition(".")
    return getattr(import_module(module), name)


@cache
def tags_by_path() -> Mapping[str, str]:
    """Return the tag of each listed import path."""
    return {path: tag for tag, path in KINDS.items()}


def replace_paths(config: Any, tags: Mapping[str, str]) -> Any:
    """Return `config` with the tag in place of each import path that a Hydra `_target_` names.

    `hydra.utils.get_method` and `get_object` name what they return by `path`.
    """
    if isinstance(config, Mapping):
        replaced = {key: replace_paths(value, tags) for key, value in config.items()}
        for key in ("_target_", "path") if "_target_" in config else ():
            path = config.get(key)
            if isinstance(path, str) and path in tags:
                replaced[key] = tags[path]
        return replaced
    if isinstance(config, list | tuple):
        return [replace_paths(value, tags) for value in config]
    return config
