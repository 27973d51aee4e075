"""What every room stands on: checks of arguments, files, paths, provenance. Imports nothing of the other rooms."""
