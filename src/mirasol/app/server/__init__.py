"""The HTTP server: OpenAI's wire format, files, scores and realtime sessions on one model."""
