"""Evaluation: answers of a checkpoint, their score beside chance and controls, and the report."""
