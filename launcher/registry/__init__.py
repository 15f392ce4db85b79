"""The runs that were started from this machine, wherever they train."""
