"""The demo's back end."""
