"""One argparse front end per command."""
