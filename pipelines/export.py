"""The export stage: a quantized model as a folder that stock diffusers loads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fp4dit import policy
from fp4dit.errors import UserError
from fp4dit.models.base import Pipeline, Source
from fp4dit.packed.card import Call, Facts, card
from fp4dit.packed.export import check_rules, pack_text_encoder_, pack_transformer_, size
from fp4dit.policy import Rule
from fp4dit.provenance import versions
from fp4dit.reconstruction import load_weights_
from fp4dit.tasks.activate import load_scales_
from pipelines.runtime import Runtime
from pipelines.stages import read_json, write_json

PROMPTS = 8  # of the run, on which the error of the text encoder is measured


@dataclass(frozen=True)
class Export:
    """`pipeline/`, with the transformer packed, and the text encoder too where there are rules for it.

    Metrics must have reached what `at_least` and `at_most` say, or `force` is needed. `metrics` are the names of what
    is scored.
    """

    model: Source
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    text_encoder: Sequence[Rule]
    at_least: Mapping[str, float]
    at_most: Mapping[str, float]
    force: bool
    metrics: Sequence[str]

    def check(self) -> None:
        if self.text_encoder:
            check_rules(self.text_encoder)
            self.model.check_text_encoder()
        unknown = [name for name in (*self.at_least, *self.at_most) if name not in self.metrics]
        if unknown:
            raise UserError(
                f"export asks for {unknown[0]}, which is not scored: choose among {', '.join(self.metrics)}"
            )

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        scores = read_json(needs["score"] / "metrics.json")
        missed = list(self.missed(scores["metrics"]))
        if missed and not self.force:
            raise UserError(
                f"not exported: {'; '.join(missed)}. Quantize with more bits or another method, ask for less, or give "
                "export.force=true"
            )
        pipeline = self.model.load()
        text = None
        if self.text_encoder:
            prompts = [drawn["prompt"] for drawn in read_json(needs["images"] / "images.json")[:PROMPTS]]
            text = pack_text_encoder_(pipeline.pipe, self.text_encoder, prompts)  # pyright: ignore
        rules = policy.assign(policy.layers(pipeline.dit), self.weight)
        grids, inputs = load_weights_(pipeline, self.weight, self.activation, needs["weights"] / "units")
        load_scales_(grids, needs["activations"] / "scales.safetensors")
        plain = policy.checkpoint_bytes(pipeline.dit, [])
        pack_transformer_(pipeline.dit, rules, inputs)  # pyright: ignore[reportArgumentType]
        base = self.base
        pipeline.save(out / "pipeline", base)
        audits = [read_json(needs[role] / "audit.json") for role in ("weights", "activations")]
        facts = Facts(
            base=base,
            pipeline=read_json(out / "pipeline" / "model_index.json")["_class_name"],
            call=self.first_call(pipeline, needs["images"]),
            weights=audits[0]["layers"],
            activations=audits[1]["layers"],
            scores=scores,
            bytes=size(pipeline.dit),
            bytes16=plain,
            text_encoder=text,
            command=runtime.command,
            tools=versions(),
        )
        (out / "pipeline" / "README.md").write_text(card(facts))
        written = {"bytes": facts.bytes, "bytes16": facts.bytes16, "text_encoder": asdict(text) if text else None}
        write_json(out / "export.json", written)

    def first_call(self, pipeline: Pipeline, images: Path) -> Call | None:
        """By which the first image was drawn; None if that took embeddings, which the folder does not have."""
        if getattr(self.model, "embeddings", None):
            return None
        first = read_json(images / "images.json")[0]
        how = read_json(images / "manifest.json")["config"]["generation"]
        [subject] = pipeline.subjects([first["prompt"]])
        return Call(subject, first["seed"], how["steps"], how["guidance"], pipeline.options)

    @property
    def base(self) -> str:
        """What the model was made from, a hub id or a package; of a folder the name, for where it lay says nothing."""
        path = str(getattr(self.model, "path", type(self.model).__name__))
        return Path(path).name if Path(path).expanduser().is_dir() else path

    def missed(self, scores: Mapping[str, Mapping[str, float] | None]) -> Iterator[str]:
        """Which scores are not as good as they should be. Those of a set have a longer name, which begins alike."""
        for word, sign, bounds in (("at least", 1, self.at_least), ("at most", -1, self.at_most)):
            for name, bound in bounds.items():
                found = [own for full, own in scores.items() if full.split("/")[0] == name and own]
                if not found:
                    yield f"{name} has no number"
                elif sign * found[0]["mean"] < sign * bound:
                    yield f"{name} is {found[0]['mean']:.4g} and should be {word} {bound:g}"
