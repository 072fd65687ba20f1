"""Files made by appending recordings to each other: where each begins, and one rising clock for all."""
