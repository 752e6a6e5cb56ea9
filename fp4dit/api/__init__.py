"""The functions that users call from Python. `fp4dit` itself exports them.

This is the only package of the library that imports Hydra and `pipelines`: it composes presets and
runs stages as the commands do, on a pipeline that is in memory.
"""
