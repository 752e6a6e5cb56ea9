"""Train a small PixArt on a world, from nothing to the model that ships.

`architecture` builds the untrained parts, `data` renders endless batches, `tasks` and `denoising`
have one training task per part, `recipe` combines these by the settings in `conf/pretrain.yaml`,
`parts` locates the trained parts, `export` writes the model, and `evaluate` measures it on held-out
captions. `pipelines.pretrain` runs it all.
"""

from typing import TYPE_CHECKING

from fp4dit.utils.lazy import export_lazily

if TYPE_CHECKING:
    from fp4dit.pretraining.data import Batch, SceneData, SceneStream, SeedNoise
    from fp4dit.pretraining.denoising import DenoisingTask
    from fp4dit.pretraining.evaluate import draw_images, evaluate_model
    from fp4dit.pretraining.export import export_model, save_clip
    from fp4dit.pretraining.recipe import (
        save_autoencoder,
        save_decoder,
        save_oracle,
        save_text_encoder,
        save_trained_clip,
        train_autoencoder,
        train_clip,
        train_decoder,
        train_oracle,
        train_text_encoder,
        train_transformer,
    )
    from fp4dit.pretraining.tasks import AutoencoderTask, ClipTask, OracleTask, TextTask

__all__ = [
    "AutoencoderTask",
    "Batch",
    "ClipTask",
    "DenoisingTask",
    "OracleTask",
    "SceneData",
    "SceneStream",
    "SeedNoise",
    "TextTask",
    "draw_images",
    "evaluate_model",
    "export_model",
    "save_autoencoder",
    "save_clip",
    "save_decoder",
    "save_oracle",
    "save_text_encoder",
    "save_trained_clip",
    "train_autoencoder",
    "train_clip",
    "train_decoder",
    "train_oracle",
    "train_text_encoder",
    "train_transformer",
]

# diffusers and open_clip take seconds to import, so each module is imported when it is used.
__getattr__ = export_lazily(
    __name__,
    {
        "data": ["Batch", "SceneData", "SceneStream", "SeedNoise"],
        "denoising": ["DenoisingTask"],
        "evaluate": ["draw_images", "evaluate_model"],
        "export": ["export_model", "save_clip"],
        "recipe": [
            "save_autoencoder",
            "save_decoder",
            "save_oracle",
            "save_text_encoder",
            "save_trained_clip",
            "train_autoencoder",
            "train_clip",
            "train_decoder",
            "train_oracle",
            "train_text_encoder",
            "train_transformer",
        ],
        "tasks": ["AutoencoderTask", "ClipTask", "OracleTask", "TextTask"],
    },
)
