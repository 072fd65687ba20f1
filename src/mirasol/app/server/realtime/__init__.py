"""Realtime sessions over a WebSocket: media comes in while questions are asked about what has come."""
