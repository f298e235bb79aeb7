"""Connections to other libraries. Nothing imports them."""
