"""Rendered data: scenes of shapes and sounds, their questions, and the media files that show them."""
