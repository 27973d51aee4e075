"""Shared foundations: argument checks, files, paths, provenance. Imports nothing from the other subpackages."""
