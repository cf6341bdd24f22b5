"""Names in files and the names they stand for. Data only, so that every framework and format shares them."""

# Projections of the VAE's attention in folders that were written before 2023.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
