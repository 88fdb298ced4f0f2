"""One module per view; each has `show(context)`."""
