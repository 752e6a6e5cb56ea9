"""Runtime of the stages: Lightning Trainers, progress displays, callbacks, and full memory.

Nothing here changes a result. `trainer.Runtime` holds the settings of a run.
"""
