"""Prefect tasks and the engines: the only place where models are imported."""
