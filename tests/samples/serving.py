"""A daemon that serves well: samples for the tests of whatever watches or tunes one."""

from __future__ import annotations

from sparsed.core import Knobs, Snapshot

KNOBS = Knobs(
    token_budget=2048,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=512,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=16,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=8192,
)
SNAPSHOT = Snapshot(
    ended_at=100.0,
    window_s=1.0,
    steps=10,
    step_p50_s=0.1,
    step_p95_s=0.2,
    step_p99_s=0.3,
    prompt_tokens_per_s=0.0,
    generated_tokens_per_s=50.0,
    hot_hit_frac=0.9,
    misses_per_step=16.0,
    miss_bytes_per_step=10.0,
    h2d_bytes=100,
    d2h_bytes=10,
    h2d_gb_per_s=1.0,
    d2h_gb_per_s=1.0,
    attention_recall=0.9,
    num_running=4,
    num_waiting=0,
    hot_used_frac=0.5,
    dram_used_frac=0.1,
    working_set_pages=640,
    working_set_bytes=640 << 12,
    metadata_bytes=4096,
    requests_finished=1,
    ttft_p95_s=0.5,
    tpot_p95_s=0.02,
    knobs=KNOBS,
    recall_samples=1,
)
