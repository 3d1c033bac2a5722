"""Exporters: a compressed (or dense) checkpoint in, a file for a runtime out."""
