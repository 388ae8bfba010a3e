"""What `mlite plan` prints of a plan and of a search."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from megatron_lite.hardware import Gpu
from megatron_lite.planner.job import Job
from megatron_lite.planner.memory import ERROR, OUTSIDE
from megatron_lite.planner.plan import Bill, Plan, overrides_of
from megatron_lite.planner.search import NOT_SEARCHED, Candidate, Found
from megatron_lite.planner.time import SCANS

UNMEASURED = "computed from data sheets: none of these numbers was measured on a GPU"


def print_plan(plan: Plan, bill: Bill | None) -> None:
    """Layout, memory, time, traffic, cost and every assumption."""
    console, job = _console(), plan.job
    console.print(f"{job.gpus:,} x {plan.gpu.name}, {_layout(job)}, {job.precision.name}", highlight=False)
    console.print(
        f"{job.tokens:,} tokens a step in {job.micro_batches:,} micro-batch{'' if job.micro_batches == 1 else 'es'} a rank; "
        f"{plan.flops_per_token:.4g} FLOPs a token",
        highlight=False,
    )
    console.print(_memory(plan))
    console.print(_time(plan))
    if plan.flows:
        console.print(_traffic(plan))
    console.print(_assumptions(plan))
    speed = plan.tokens_per_second
    console.print(
        f"step {plan.step.seconds:.4g} s, MFU {100 * plan.step.mfu:.1f} % of the {job.precision.peak} peak, {speed:,.0f} tokens/s, "
        f"{speed / job.gpus:,.0f} a GPU",
        highlight=False,
    )
    if bill is not None:
        cost = "" if bill.cost is None else f", {bill.cost:,.0f} at {bill.cost / bill.gpu_hours:,g} a GPU-hour"
        console.print(
            f"{bill.tokens:,} tokens at this batch and speed: {bill.days:,.2f} days, {bill.gpu_hours:,.0f} GPU-hours{cost}",
            highlight=False,
        )
    else:
        console.print("set train.max_tokens or train.max_steps for days and GPU-hours", highlight=False)
    console.print(_verdict(plan), highlight=False)
    console.print(UNMEASURED, highlight=False)


def print_found(found: Found, job: Job, gpu: Gpu) -> None:
    """The best layouts, and how many others lost for which reason."""
    console = _console()
    table = Table("layout", "s a step", "MFU %", "GB a rank", "why it loses", title=f"{job.gpus:,} x {gpu.name}")
    for one in found.best:
        assert one.step is not None, "the best are timed"
        held = f"{(one.memory or 0) / 1e9:.1f}"
        table.add_row(_layout(one.job), f"{one.step.seconds:.4g}", f"{100 * one.step.mfu:.1f}", held, one.loses)
    console.print(table)
    console.print(f"the first one: {overrides_of(found.best[0].job)}", highlight=False, soft_wrap=True)
    for reason, (count, example) in _reasons(found.others).items():
        console.print(f"{count} others {reason}, such as {_layout(example.job)}: {example.loses}", highlight=False)
    console.print(UNMEASURED, highlight=False)


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 160)


def _layout(job: Job) -> str:
    """In a few words. Also of a layout that training refuses."""
    tp, cp, copies = job.parallel.tp, job.parallel.cp, job.parallel.dp_replicate
    shards = job.gpus // (tp * cp * copies)
    if job.engine.replicates:
        copies, shards = copies * shards, 1
    counts = {"dp_replicate": copies, "dp_shard": shards, "cp": cp, "tp": tp}
    words = [f"{name} {count}" for name, count in counts.items() if count > 1] or ["one rank"]
    sequence = "+sp" if job.parallel.sequence_parallel and tp > 1 else ""
    mode = f"{job.engine.name} {job.shard}" if job.engine.name == "fsdp" else job.shard
    return f"{' x '.join(words)}{sequence}, {mode}, recompute {job.parallel.recompute}, micro-batch {job.micro_batch}"


def _reasons(others: list[Candidate]) -> dict[str, tuple[int, Candidate]]:
    """Kind of reason -> (how many lost for it, one of them: that of the shortest time, or the first)."""
    kinds = {one.loses: _kind(one.loses) for one in others}
    counts = Counter(kinds[one.loses] for one in others)
    examples = {kinds[one.loses]: one for one in reversed(others)}
    return {kind: (count, examples[kind]) for kind, count in counts.items()}


def _kind(reason: str) -> str:
    if reason == NOT_SEARCHED:
        return "were not looked at (search_seconds)"
    if "slower" in reason:
        return "are slower than those above"
    return "do not fit" if reason.startswith("does not fit") else "are refused"


def _memory(plan: Plan) -> Table:
    table = Table("memory of a rank", "GB", title_justify="left")
    for name, size in plan.memory.parts.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("outside: context, NCCL, fragments (assumed)", f"{OUTSIDE / 1e9:.2f}")
    table.add_row(f"sum, in {plan.memory.moment}", f"{(plan.memory.total + OUTSIDE) / 1e9:.2f}", end_section=True)
    return table


def _time(plan: Plan) -> Table:
    table = Table("time of a step", "ms", "%")
    for name, seconds in sorted(plan.step.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{100 * seconds / plan.step.seconds:.1f}")
    return table


def _traffic(plan: Plan) -> Table:
    table = Table("a rank sends in a step", "ranks", "nodes", "GB over links", "GB over the network", "overlaps with")
    for flow in plan.flows:
        sizes = (f"{size / 1e9:.3f}" for size in (flow.link, flow.network))
        table.add_row(flow.what, str(flow.group.ranks), str(flow.group.nodes), *sizes, flow.beside)
    return table


def _assumptions(plan: Plan) -> Table:
    gpu = plan.gpu
    table = Table("assumed", "value", "what it is")
    for name, why in plan.assumptions.why.items():
        if (name.startswith("host") and not plan.job.offloads) or (name == "scan" and SCANS not in plan.step.parts):
            continue
        table.add_row(name, f"{getattr(plan.assumptions, name):g}", why)
    if SCANS in plan.step.parts:
        table.add_row(SCANS, *_scans(plan.job))
    for name, value, unit in (
        (f"{plan.job.precision.peak} peak", gpu.flops(plan.job.precision.peak) / 1e12, "TFLOP/s"),
        ("memory's size", gpu.memory / 1e9, "GB"),
        ("memory's bandwidth", gpu.bandwidth / 1e9, "GB/s"),
        ("link's bandwidth", gpu.link / 1e9, f"GB/s in one direction, {gpu.node} GPUs in a node"),
    ):
        table.add_row(name, f"{value:g}", f"{unit}, data sheet of {gpu.name}")
    table.add_row(
        "network's bandwidth",
        f"{gpu.network / 1e9:g}",
        "GB/s in one direction for each GPU, of the usual node (hardware.py)",
    )
    return table


def _scans(job: Job) -> tuple[str, str]:
    if job.masked:
        return (
            "PyTorch",
            "operator by operator: the kernels of libraries take no packed documents (data.reset_attention)",
        )
    if job.scan_kernels:
        return "kernels", "of flash-linear-attention and mamba-ssm, where these take what is scanned: scan_kernels=true"
    return "PyTorch", "operator by operator, as without these libraries; scan_kernels=true plans their kernels"


def _verdict(plan: Plan) -> str:
    needed, there = (plan.memory.total + OUTSIDE) / 1e9, plan.gpu.memory / 1e9
    if plan.fits:
        narrowly = f"; the plan may be off by {ERROR:.0%}" if needed > (1 - ERROR) * there else ""
        return f"fits: {needed:.1f} of {there:.0f} GB{narrowly}"
    return f"does not fit: {needed:.1f} of {there:.0f} GB; search=true lists layouts that do"
