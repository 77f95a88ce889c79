"""Order, settings and the command line: what runs when, and with which parameters."""
