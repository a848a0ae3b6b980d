"""The commands adaattn-export, adaattn-parity and adaattn-run. Their modules import little, so `--help` is fast."""
