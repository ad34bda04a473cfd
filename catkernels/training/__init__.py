"""Training a CAT classifier: the data, the paper's recipe, the loop, and what a run leaves."""
