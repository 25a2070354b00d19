"""Explanations that are checked: where a network looks, whether that is true of it, and when it fails."""
