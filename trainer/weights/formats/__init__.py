"""One module per format of other code bases: its names as data, and what only it needs."""
