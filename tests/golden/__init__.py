"""Numbers of the official code, and the runner that holds Fovea to them: `pytest tests/golden --golden-dir DIR`."""
