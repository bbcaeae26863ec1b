"""Each stage of an export compared with the one before."""
