"""Live sources: media that is still coming in, chunk by chunk, as a file's would be."""
