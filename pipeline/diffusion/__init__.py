"""The lecture's equations and the pipeline: all that travels to the Hub."""
