"""The page of a server: ask in a browser, and see where the answer came from."""
