"""The mathematics of Mirasol: no files, no devices, no logging."""
