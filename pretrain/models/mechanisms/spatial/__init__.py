"""Spatial attention: one file per mechanism. Each weighs the places of a map."""
