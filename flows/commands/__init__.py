"""The commands, grouped by what a user does: run, look, move environments, overrule answers, keep the store in order.

A command reads its options, calls one function of `tasks` and prints what that returns. What loads a model, Prefect or
charts is imported inside the command that needs it, so that `--help` stays quick.
"""
