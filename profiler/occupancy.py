"""Who has the memory of the device."""

from __future__ import annotations

from sparsed.core import HbmUse, HostGauges, MemoryPlan


def occupancy(
    plan: MemoryPlan, host: HostGauges, *, weights_bytes: int, peak_bytes: int = 0
) -> HbmUse:
    """The planner's parts beside what the driver counts. ``weights_bytes``: as loaded;
    ``peak_bytes``: as the engine tells it, 0 where it does not.

    What is in use and belongs to no part is ``rest_bytes``; a driver that counts less for the engine
    than its parts take leaves none.
    """
    known = plan.hot_bytes + weights_bytes
    own = host.gpu_own_bytes
    used, total = host.gpu_used_bytes, host.gpu_total_bytes
    return HbmUse(
        weights_bytes=weights_bytes,
        hot_pages_bytes=plan.hot_pages_bytes,
        summaries_bytes=plan.summaries_bytes,
        tables_bytes=plan.tables_bytes,
        staging_bytes=plan.staging_bytes,
        prefill_buffer_bytes=plan.prefill_buffer_bytes,
        rest_bytes=None if own is None else max(0, own - known),
        others_bytes=host.gpu_others_bytes,
        free_bytes=None if used is None or total is None else max(0, total - used),
        peak_bytes=max(peak_bytes, own or 0) or None,
    )
