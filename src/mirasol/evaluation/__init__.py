"""Evaluation: answers of a checkpoint, their scores compared with chance and controls, and the report."""
