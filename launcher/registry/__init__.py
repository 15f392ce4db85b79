"""The runs that were started or submitted from this machine."""
