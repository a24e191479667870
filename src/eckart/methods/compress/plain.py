"""What methods share that write an ordinary smaller model: its plan."""

from collections.abc import Sequence

from eckart.budget import BYTES
from eckart.methods.compress.job import Job
from eckart.methods.compress.outcome import LayerPlan, Plan, Spent


def plain_plan(job: Job, rows: Sequence[LayerPlan]) -> Plan:
    """Return the plan of a smaller model, given a row for every parameter of the original."""
    limit, bytes_only = job.request.limit, job.request.limit.measure == BYTES
    nbytes = sum(row.nbytes for row in rows)
    return Plan(
        job.request.method,
        None if bytes_only else limit.amount,
        job.model.numel,
        sum(row.numbers for row in rows),
        job.model.nbytes,
        nbytes,
        "not predicted",
        tuple(rows),
        Spent(str(limit), BYTES.unit, job.model.nbytes, nbytes) if bytes_only else None,
    )
