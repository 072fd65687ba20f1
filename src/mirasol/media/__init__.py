"""Media file in, chunks out: reader, timeline, spectrogram, processor. See docs/media.md for every behaviour."""
