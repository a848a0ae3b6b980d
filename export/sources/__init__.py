"""Load models from files, factories and Hugging Face folders, and sample data for calibration."""
