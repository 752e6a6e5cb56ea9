"""Commands and their parts.

Each module is a command: `python -m pipelines.NAME`. The packages hold what commands share:
`config` reads configs, `planning` makes stages of them, `stages` defines the stages, `runtime`
runs them, `results` reads what they leave in the store, `search` optimizes scores, `tracking` logs
to W&B, and `cli` runs a command and explains its errors.
"""
