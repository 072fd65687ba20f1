"""Typed configuration: of the model, its parts, the presets and training recipes. Imports no other room."""
