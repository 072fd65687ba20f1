"""Starting weights: a Mirasol model whose image side and text decoder begin as models that others have trained."""
