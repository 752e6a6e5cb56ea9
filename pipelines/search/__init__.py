"""Searches with Optuna: objectives, search spaces and studies.

The Hydra sweeper that uses them is `hydra_plugins/optuna_search.py`.
"""
