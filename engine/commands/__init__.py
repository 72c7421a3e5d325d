"""The command line, one module for a command."""
