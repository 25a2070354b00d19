"""Runs Fovea's mechanisms, explanations and sharpness-aware steps on golden cases, by the `kind` of a case."""
