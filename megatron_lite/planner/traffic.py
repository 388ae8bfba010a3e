"""What travels between the ranks of a layout: how many bytes, in which group, over which link, and how long.

A collective over n ranks is a ring: each rank sends (n - 1)/n of the whole tensor, an all-reduce twice that. A group that lies in one
node uses the node's links. One that spans nodes crosses the network with all the cards of its ranks in a node, g of them: its ring is
as fast as the slower of a link and g cards, and of what a rank sends 1/g goes over the network. Each of the ring's steps has a
latency, which is what limits a group of hundreds of nodes.

The latencies are those by which NCCL chooses its protocol (src/graph/tuning.cc at b647562: base, NVLink and network in microseconds,
and the part of the bandwidth that is left), and like NCCL this takes the fastest protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_lite.hardware import Gpu
from megatron_lite.parallel.mesh import Degrees
from megatron_lite.planner.job import Job
from megatron_lite.planner.operators import Exchange
from megatron_lite.planner.work import Unit

GRADIENT_BYTES = 4  # gradients are reduced in fp32


@dataclass(frozen=True)
class Protocol:
    """Seconds a collective takes before the first byte (base), for a step inside a node and to another one; part of the bandwidth."""

    base: float
    link: float
    network: float
    bandwidth: float
    bandwidth_alone: float  # where a node has only one rank of the group


PROTOCOLS = (
    Protocol(8.4e-6, 3.4e-6, 14.0e-6, 1.0, 1.0),  # Simple
    Protocol(14.0e-6, 1.9e-6, 4.0e-6, 0.92, 0.7),  # LL128
    Protocol(6.6e-6, 0.6e-6, 2.7e-6, 0.25, 0.25),  # LL
)


@dataclass(frozen=True)
class Group:
    """The ranks along axes of the mesh: how many, on how many nodes, and how many of them on each."""

    ranks: int
    nodes: int

    @property
    def in_node(self) -> int:
        """Ranks of the group on one node."""
        return ceil(self.ranks / self.nodes)


def group_of(degrees: Degrees, axis: str, node: int) -> Group:
    """The group of the first rank along tp, cp, dp_shard (with cp, as weights are sharded), dp_replicate or world, on nodes of `node`
    GPUs."""
    shard = degrees.dp_shard * degrees.cp
    ranks, stride = {
        "tp": (degrees.tp, 1),
        "cp": (degrees.cp, degrees.tp),
        "dp_shard": (shard, degrees.tp),
        "dp_replicate": (degrees.dp_replicate, degrees.tp * shard),
        "world": (degrees.world_size, 1),
    }[axis]
    together = max(1, min(ranks, node // stride))
    return Group(ranks, ceil(ranks / together))


@dataclass(frozen=True)
class Collective:
    """One collective of a tensor of `size` bytes over `group`. twice: an all-reduce, which sends everything twice."""

    size: float
    group: Group
    twice: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return (2 if self.twice else 1) * self.size * (self.group.ranks - 1) / self.group.ranks

    @property
    def over_network(self) -> float:
        """The part of `sent` that leaves the node, on average over the ranks."""
        return self.sent / self.group.in_node if self.group.nodes > 1 else 0.0

    def seconds(self, gpu: Gpu, *, link: float, network: float) -> float:
        """With those parts of the data sheet's bandwidths."""
        if self.group.ranks == 1 or not self.size:
            return 0.0
        bandwidth = gpu.link * link
        if self.group.nodes > 1:
            bandwidth = min(bandwidth, self.group.in_node * gpu.network * network)
        return min(self._by(protocol, bandwidth) for protocol in PROTOCOLS)

    def _by(self, protocol: Protocol, bandwidth: float) -> float:
        alone = self.group.nodes > 1 and self.group.in_node == 1
        between = self.group.nodes - 1
        steps = (self.group.ranks - 1 - between) * protocol.link + between * protocol.network
        part = protocol.bandwidth_alone if alone else protocol.bandwidth
        return protocol.base + (2 if self.twice else 1) * steps + self.sent / (bandwidth * part)


def exchange(step: Exchange, degrees: Degrees, node: int) -> Collective:
    """The collective of a layer."""
    return Collective(step.size, group_of(degrees, step.axis, node), twice=step.operation == "all_reduce")


@dataclass(frozen=True)
class Sharding:
    """What the data-parallel ranks send for one unit: its weights, and its gradients."""

    gather: list[Collective]
    reduce: list[Collective]


def sharding_of(job: Job, unit: Unit, node: int) -> Sharding:
    """The collectives of one gather and one reduction of `unit`; none where there is one rank."""
    shard, replicate = (group_of(job.degrees, axis, node) for axis in ("dp_shard", "dp_replicate"))
    gradients = float(GRADIENT_BYTES * unit.numbers)
    gather = [Collective(float(unit.sent), shard)] if shard.ranks > 1 else []
    reduce = [Collective(gradients, shard)] if shard.ranks > 1 else []
    if replicate.ranks > 1:
        reduce.append(Collective(gradients / shard.ranks, replicate, twice=True))
    return Sharding(gather, reduce)


@dataclass(frozen=True)
class Timetable:
    """When a layout gathers weights: in the forward pass of each micro-batch or of the first one, again in each backward, or after the
    update. And whether it reduces gradients in each backward, or in the last one only."""

    forward: str = "never"  # each | first | never
    backward: bool = False
    after_update: bool = False
    reduces_each: bool = False

    def gathers_in_forward(self, micro_batch: int) -> bool:
        """Of the micro-batch with that number, from 0."""
        return self.forward == "each" or (self.forward == "first" and micro_batch == 0)


TIMETABLES: dict[str, Timetable] = {
    "none": Timetable(),
    "optimizer": Timetable("first"),
    "full": Timetable("each", backward=True),
    "zero 1": Timetable(after_update=True),
    "zero 2": Timetable(after_update=True, reduces_each=True),
    "zero 3": Timetable("each", backward=True, reduces_each=True),
}


def stays_gathered(unit: Unit) -> bool:
    """Embedding and head are gathered once for forward and backward."""
    return not unit.name.startswith("layers.")


@dataclass(frozen=True)
class Flow:
    """A row of the table of traffic: bytes that a rank sends in a step, by link."""

    what: str
    group: Group
    link: float
    network: float
    beside: str  # what it overlaps with


def flows(job: Job, units: list[Unit], node: int) -> list[Flow]:
    """What a rank sends in a step."""
    timetable, batches = TIMETABLES[job.shard], job.micro_batches
    rows = [
        _flow(
            f"{axis}: activations and their gradients",
            [
                exchange(step, job.degrees, node)
                for unit in units
                for step in unit.steps
                if isinstance(step, Exchange) and step.axis == axis
            ],
            times=batches,
            beside=beside,
        )
        for axis, beside in (("tp", "nothing"), ("cp", "attention"))
    ]
    gathers, reduces = [], []
    of_teacher: list[Collective] = []
    for unit in units:
        sharding = sharding_of(job, unit, node)
        if unit.frozen:
            of_teacher += sharding.gather * batches
            continue
        times = sum(map(timetable.gathers_in_forward, range(batches))) + int(timetable.after_update)
        times += batches if timetable.backward and not stays_gathered(unit) else 0
        gathers += sharding.gather * times
        reduces += sharding.reduce * (batches if timetable.reduces_each else 1)
    rows.append(_flow("weights of the teacher gathered", of_teacher, times=1, beside="the layer before"))
    beside = "nothing, after the update" if timetable.after_update else "the layer before"
    rows.append(_flow("weights gathered", gathers, times=1, beside=beside))
    beside = "backward" if timetable.reduces_each else "backward of the last micro-batch"
    for what, twice in (("gradients reduced over shards", False), ("gradients summed over replicas", True)):
        rows.append(_flow(what, [c for c in reduces if c.twice == twice], times=1, beside=beside))
    return [row for row in rows if row is not None]


def _flow(what: str, collectives: list[Collective], *, times: int, beside: str) -> Flow | None:
    if not collectives:
        return None
    sent, network = sum(c.sent for c in collectives), sum(c.over_network for c in collectives)
    return Flow(what, collectives[0].group, (sent - network) * times, network * times, beside)
