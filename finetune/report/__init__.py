"""What a person looks at: predictions drawn on their images, curves, tables, one HTML page of a run."""
