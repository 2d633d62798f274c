"""The claims of the two papers, each measured again: ``bench reproduce``."""
