"""sparsed: sparse attention over two KV tiers, served and tuned by one daemon."""

__version__ = "0.1.0"
