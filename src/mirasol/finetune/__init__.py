"""From a folder of one's own clips to a measured model: layouts, splits, a recipe by rules, the run and its results."""
