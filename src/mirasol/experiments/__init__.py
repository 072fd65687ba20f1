"""Experiments on real recordings, one command a table: data sets' own folds, trainings, baselines, intervals."""
