"""The avl command: one module per subcommand."""
