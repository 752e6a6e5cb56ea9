"""Export stage: write a quantized pipeline as a folder that stock diffusers loads."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from fp4dit.models.base import Pipeline
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.packed.export import (
    TextEncoderReport,
    check_text_encoder_rules,
    count_state_bytes,
    pack_text_encoder_,
    pack_transformer_,
)
from fp4dit.packed.model_card import CardFacts, PipelineCall, render_model_card
from fp4dit.packed.targets.samples import check_export
from fp4dit.quantization.audit import checkpoint_bytes
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.unit_files import load_quantized_
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json, write_json
from fp4dit.utils.image_files import count_frames
from fp4dit.utils.provenance import read_package_versions
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Stage
from pipelines.stages.scalars import read_audits
from pipelines.stages.second import SecondTransformer

ERROR_PROMPTS = 8  # prompts on which the error of the text encoder is measured


@dataclass(frozen=True)
class Export(Stage):
    """Stage that writes a pipeline with a packed transformer, and optionally a packed text encoder.

    Args:
        text_encoder: Rules for the text encoder; without any it is not quantized.
        export_format: The function that converts the packed pipeline to another library's format,
            given its folder and a new one; None leaves it packed.
        at_least: The least values that metrics must reach.
        at_most: The greatest values that metrics may have.
        force: Whether to export although a metric misses its bound.
        metrics: The names of all metrics that are scored.
        second: The second transformer, if the pipeline has two that are quantized.

    Example:
        See the node `export` of `conf/stages/default.yaml`.
    """

    model: PretrainedSource
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    text_encoder: Sequence[Rule]
    export_format: partial[Sequence[str]] | None
    at_least: Mapping[str, float]
    at_most: Mapping[str, float]
    force: bool
    metrics: Sequence[str]
    second: SecondTransformer | None = None

    def check(self) -> None:
        """Raise UserError if the stage cannot run as configured."""
        if self.text_encoder and self.export_format:
            raise UserError(
                "a packed text encoder cannot be loaded without fp4dit, which export_format is "
                "for: use text_encoder=none"
            )
        self.check_export_format()
        if self.text_encoder:
            check_text_encoder_rules(self.text_encoder)
            self.model.check_text_encoder()
        for name in (*self.at_least, *self.at_most):
            if name not in self.metrics:
                raise UserError(
                    f"export asks for {name}, which is not scored: choose among "
                    f"{', '.join(self.metrics)}"
                )

    def check_export_format(self) -> None:
        """Raise UserError if the export format cannot hold what the rules quantize."""
        if self.export_format is None:
            return
        if self.second:
            raise UserError(
                "export_format writes a pipeline with one quantized transformer: leave it out, or "
                "export one transformer, with stages=default and model.transformer="
            )
        options = self.export_format.keywords
        if "target" not in options:
            raise UserError("export_format=fp4dit is what an export is without it: leave it out")
        check_export(
            options["target"],
            self.model.build_on_meta().transformer,
            self.weight,
            options.get("dtype") or self.model.dtype,
            options.get("dense", ()),
        )

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        """Write the folder, its model card and `export.json`.

        Raises:
            UserError: if a metric misses its bound, or if the model cannot be packed.
        """
        scores = read_json(needs["score"] / "metrics.json")
        self.check_scores(scores["metrics"])
        pipeline = self.model.load()
        text_encoder = self.pack_text_encoder(pipeline, needs["images"])
        bytes16 = self.pack_transformer(pipeline, needs)
        packed = [pipeline.transformer]
        if self.second:
            bytes16 += self.second.pack_(pipeline, needs)
            packed.append(self.second.find_transformer(pipeline))
        pipeline.save(out / "pipeline", self.base_name)
        facts = CardFacts(
            base=self.base_name,
            pipeline=read_json(out / "pipeline" / "model_index.json")["_class_name"],
            call=self.first_call(pipeline, needs["images"]),
            weights=read_audits(needs, "weights")["layers"],
            activations=read_audits(needs, "activations")["layers"],
            scores=scores,
            bytes=sum(map(count_state_bytes, packed)),
            bytes16=bytes16,
            text_encoder=text_encoder,
            command=runtime.command,
            tools=read_package_versions(),
            is_video=count_frames(needs["images"] / "images" / "00000.png") > 1,
            transformers=len(packed),
        )
        (out / "pipeline" / "README.md").write_text(render_model_card(facts))
        self.convert(out / "pipeline")
        sizes = {
            "bytes": facts.bytes,
            "bytes16": facts.bytes16,
            "text_encoder": asdict(text_encoder) if text_encoder else None,
        }
        write_json(out / "export.json", sizes)

    def convert(self, folder: Path) -> None:
        """Convert the exported pipeline in a folder to another library's format, if there is one.

        Raises:
            UserError: if a layer cannot be stored exactly.
        """
        if self.export_format is None:
            return
        packed = folder.with_name("packed")
        folder.replace(packed)
        for note in self.export_format(str(packed), str(folder)):
            print(f"export: {note}")
        shutil.rmtree(packed)

    def pack_text_encoder(self, pipeline: Pipeline, images: Path) -> TextEncoderReport | None:
        """Pack the text encoder in place, if there are rules for it."""
        if not self.text_encoder:
            return None
        entries = read_json(images / "images.json")[:ERROR_PROMPTS]
        prompts = [entry["prompt"] for entry in entries]
        return pack_text_encoder_(pipeline.pipe, self.text_encoder, prompts)  # pyright: ignore

    def pack_transformer(self, pipeline: Pipeline, needs: Mapping[str, Path]) -> int:
        """Load weights and scales, and pack the transformer in place.

        Returns:
            The bytes of the transformer with all tensors in 16 bits.
        """
        rules = assign_rules(find_layers(pipeline.transformer), self.weight)
        _, input_rules = load_quantized_(
            pipeline,
            self.weight,
            self.activation,
            needs["weights"],
            needs["activations"],
        )
        bytes16 = checkpoint_bytes(pipeline.transformer, [])
        pack_transformer_(pipeline.transformer, rules, input_rules)  # pyright: ignore[reportArgumentType]
        return bytes16

    def first_call(self, pipeline: Pipeline, images: Path) -> PipelineCall | None:
        """Return how the first image was drawn.

        Returns:
            The call, or None if the images were drawn from embeddings, which are not exported.
        """
        if self.model.draws_from_embeddings:
            return None
        first = read_json(images / "images.json")[0]
        generation = read_json(images / "manifest.json")["config"]["generation"]
        [pipeline_input] = pipeline.pipeline_inputs([first["prompt"]])
        return PipelineCall(
            pipeline_input,
            first["seed"],
            generation["steps"],
            generation["guidance"],
            pipeline.options,
        )

    @property
    def base_name(self) -> str:
        """The original model: a hub id, a package, or the name of a folder without its path."""
        path = Path(self.model.path)
        return path.name if path.expanduser().is_dir() else self.model.path

    def check_scores(self, scores: Mapping[str, Mapping[str, float] | None]) -> None:
        """Raise UserError if a metric misses its bound and `force` is not set."""
        missed = [
            *self.find_missed_bounds(scores, "at least", 1, self.at_least),
            *self.find_missed_bounds(scores, "at most", -1, self.at_most),
        ]
        if missed and not self.force:
            raise UserError(
                f"not exported: {'; '.join(missed)}. Quantize with more bits or another method, "
                "ask for less, or give export.force=true"
            )

    @staticmethod
    def find_missed_bounds(
        scores: Mapping[str, Mapping[str, float] | None],
        relation: str,
        sign: int,
        bounds: Mapping[str, float],
    ) -> Iterator[str]:
        """Yield a sentence for each bound that a score misses.

        The name of a metric of a set continues with a slash and what it is compared with.

        Args:
            relation: "at least" or "at most".
            sign: 1 for lower bounds, -1 for upper bounds.
        """
        for name, bound in bounds.items():
            score = None
            for full_name, candidate in scores.items():
                if full_name.split("/")[0] == name and candidate and score is None:
                    score = candidate
            if score is None:
                yield f"{name} has no number"
            elif sign * score["mean"] < sign * bound:
                yield f"{name} is {score['mean']:.4g} and should be {relation} {bound:g}"
