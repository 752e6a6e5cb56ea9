"""No secret becomes part of what is stored and shown."""

import os
import re

from omegaconf import DictConfig, OmegaConf

from fp4dit.errors import UserError

NAMES = re.compile("TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
ASKED = re.compile(r"oc\.env:\s*(\w+)")
SHORTEST = 12  # characters: what is shorter may stand in a config by chance


def check_secrets(cfg: DictConfig) -> None:
    """Of what manifests, logs and W&B repeat.

    Raises:
        UserError: if it holds, or asks for, an environment variable that is called a secret.
    """
    check_text(OmegaConf.to_yaml(cfg))


def check_text(said: str) -> None:
    """The same of an override, before Hydra writes down what it was given."""
    held = [name for name, value in os.environ.items() if len(value) >= SHORTEST and value in said]
    for name in [*held, *ASKED.findall(said)]:
        if NAMES.search(name):
            raise UserError(
                f"{name} is in the configuration, which is stored and shown: leave it out. What needs it, as wandb and "
                "the hub do, finds it in the environment"
            )
