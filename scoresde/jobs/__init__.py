"""Long computations: resumable, sharded folders of results, the processes that share them, and locks on folders."""

from scoresde.jobs.bits import BitsJob, check_probes, estimator_options, numbers_of
from scoresde.jobs.job import RESULT_FILE, SETTINGS_FILE, Job
from scoresde.jobs.lock import check_free, locked
from scoresde.jobs.processes import launched, share_of

__all__ = [
    "RESULT_FILE",
    "SETTINGS_FILE",
    "BitsJob",
    "Job",
    "check_free",
    "check_probes",
    "estimator_options",
    "launched",
    "locked",
    "numbers_of",
    "share_of",
]
