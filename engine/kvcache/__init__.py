"""Two tiers of KV pages, their tables, and the copies between them."""
