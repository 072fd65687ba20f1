"""What users have in place of a media file: frames and samples in memory, values of data sets, conversations."""
