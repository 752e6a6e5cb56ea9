"""Plans: the stages of a composed config, their keys, their cache and their execution.

`plan.make_plan` computes each stage's identity and key, `executor.execute_plan` runs the stages
that have no result yet, and `stage_kinds` lists the tags that identities contain.
"""
