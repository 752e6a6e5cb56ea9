"""The file format of packed checkpoints.

`codes` maps values to integers, `qparams` encodes scales, `layout` joins both
to the buffers of a weight, `schema` describes a model in JSON, and `integrity` verifies the files.
docs/reference/checkpoint.md specifies the format.
"""
