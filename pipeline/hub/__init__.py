"""Publish models and demos on the Hub."""
