"""Packed checkpoints in the formats of other libraries, which load them without fp4dit.

A target (`base.Target`) is one format. It says how it stores a layer, or why it cannot, and writes
and reads a folder. `conversion` converts folders, and `card` writes their model cards.

To add a target, make a module here with a subclass of `base.Target`, and a YAML file in
`conf/export_format` that names it; `conf/export_format/fp4dit.yaml` lists what is read back.
"""
