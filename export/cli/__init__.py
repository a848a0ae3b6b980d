"""Define the commands adaattn-export, adaattn-parity and adaattn-run. Their modules import little: help is fast."""
