"""The report of a run: predictions drawn on their images, curves, tables, one HTML page."""
