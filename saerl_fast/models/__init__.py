"""Language models: loading them, what has to hold of them, and their layout."""
