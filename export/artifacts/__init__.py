"""The files of an export: output folder, manifest, JSON and NumPy files. Nothing here needs torch."""
