"""The reference: oracles of every operator, and a SyncMask model trained on top of them."""
