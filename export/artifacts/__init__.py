"""Read and write the files of an export: output folder, manifest, JSON and NumPy files. No torch is needed."""
