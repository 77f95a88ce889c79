"""The stages, one file each, in the order in which they run."""

from mllmsrec_core.stage import Stage
from mllmsrec_core.stages import audit, caption, examples, images, ingest, preference, score, sft, summary

STAGES: tuple[Stage, ...] = (
    ingest.STAGE,
    images.STAGE,
    caption.STAGE,
    summary.STAGE,
    preference.STAGE,
    examples.STAGE,
    sft.STAGE,
    score.STAGE,
    audit.STAGE,
)
