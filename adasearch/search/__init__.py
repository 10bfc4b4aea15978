"""Scores -> the next configuration: dimensions, space, surrogate, sampler, study, executor and the loop.

This room never sees a model. Between it and the pruning pipeline pass two frozen values, `TrialConfig` and
`TrialResult`, so the whole of it runs, and is tested, against a synthetic objective.
"""
