"""What the formulas of cost take from a cluster: effective rates and fixed costs of one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmspec.compiler.cost.types import Types
from llmspec.compiler.errors import Unsupported
from llmspec.compiler.kernels.measured import NOTHING, Measured, measured_of
from llmspec.compiler.ops.registry import BY_NAME
from llmspec.compiler.placement import Collective
from llmspec.dsl.program import Cluster, Device, DeviceKind

GPU_CONSTANTS = {
    # One kernel's launch and tail as the stream sees it, queue kept full; NVIDIA's own blog on CUDA
    # graphs gives 2-4 us (Gray 2019).
    "launch_s": 4e-6,
    # A hop of NCCL inside a node and between nodes: order of nccl-tests' smallest messages
    # (8 ranks, 8 B: about 20 us inside a node, 40 us on InfiniBand).
    "link_latency_s": 2e-6,
    "network_latency_s": 6e-6,
    # CUDA context 0.5 GB, NCCL's channels 0.5-1 GB, allocator slack.
    "fixed_bytes": 2.0 * 2**30,
    # Share of the dense peak that bf16 products reach beside what their tiles lose: 183 shapes on
    # A100-PCIe have medians of 0.74 to 0.79, quartiles 0.01 apart (SimuMax, configs/system); the
    # best shapes reach 0.81 on A100-PCIe and 0.80 on H100 SXM (stas00/ml-engineering).
    "matmul_efficiency": 0.75,
    # Share of the dense peak that fused attention reaches in long sequences with heads of 128,
    # forward and backward together: A100 0.63 of FlashAttention-2's chart; cuDNN 0.49 on B200
    # (SimuMax, configs/system).
    "attention_efficiency": 0.50,
    # Share of peak bandwidth that a long copy reaches.
    "memory_efficiency": 0.85,
    # Bus bandwidth of nccl-tests on large messages over the link's rate.
    "link_efficiency": 0.80,
    "network_efficiency": 0.85,
    # What a step keeps of the rates of kernels timed alone, in clocks and between kernels: of ten
    # sources of published steps, each left out in turn, the others give 0.90 to 0.92
    # (docs/validation.md).
    "sustained": 0.91,
    # Share of a collective on its own stream that kernels can hide: it holds some multiprocessors.
    "overlap": 0.90,
    # Share of the host link that long copies of pinned memory reach: 25 to 26 of 31.5 GB/s
    # (generation 4) and 53 to 55 of 63 GB/s (generation 5) in nvbandwidth's published runs.
    "host_link_efficiency": 0.82,
    # Bytes/s at which all processes of a node together update weights on the CPU. ZeRO-Offload
    # (Ren et al. 2021, arXiv 2101.06840, table 4): 2.41 s for AdamW of 8e9 parameters, 28 bytes
    # each, on two sockets of 24 cores.
    "host_update_bytes_per_s": 9.3e10,
    # Streaming multiprocessors, for how a product's tiles fill them.
    "multiprocessors": 132.0,
}

CPU_CONSTANTS = {
    # PyTorch's dispatch of one operator, forward or backward.
    "launch_s": 8e-6,
    # Gloo on one machine: an all-reduce of 10 kB takes 1.3 ms on two processes.
    "link_latency_s": 3e-4,
    "network_latency_s": 5e-4,
    # Interpreter and libraries of one process.
    "fixed_bytes": 0.4 * 2**30,
    "matmul_efficiency": 0.70,
    "attention_efficiency": 0.70,
    "memory_efficiency": 0.70,
    "sustained": 1.0,
    "link_efficiency": 0.90,
    "network_efficiency": 0.80,
    # Gloo's threads run on the cores that compute.
    "overlap": 0.0,
    # The host's memory is the device's.
    "host_link_efficiency": 1.0,
    "multiprocessors": 1.0,
}

GPU_HOST_LINK_BYTES_PER_S = 15.75e9
"""Where a device does not say: PCIe of generation 3, 16 lanes, the slowest of the library's."""

FUSED = "fused_"
"""A constant `fused_loss = 1` says that the software has one kernel for the loss: what published
runs have and emitted programs do not."""

OPTIMIZER_BYTES = "optimizer_bytes"
"""A constant: bytes a parameter that an optimizer of many kernels moves."""

GRADIENT_BYTES = "gradient_bytes"
"""A constant: bytes a parameter that each micro-batch moves to add up gradients, by software that
stores weights in the type that it multiplies."""

BUCKET_ELEMENTS = "bucket_elements"
"""A constant: software sums so many gradients at once, or up to one weight's more, in a flat copy
that stays."""

HELD_BYTES, PART_BYTES = "held_bytes", "part_bytes"
"""Constants: bytes that software holds besides, of each parameter of a rank's stages, and of each
that the rank updates."""

CPU_LINK_BYTES_PER_S = 1e9
"""Gloo over shared memory: 0.9 GB/s of bus bandwidth between two processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Effective rates of one device, its links and its network.

    matrix_flops, attention_flops, vector_flops: operations/s of matrix products in the compute
        type, of those inside fused attention, and of all else.
    gather_overlap: share that kernels can hide of a gather of parameters.
    cut_sends: a message between stages goes in parts, one of each tensor rank, which gather it.
    ring_share: of the network's rate, what rings over several nodes reach and messages pass.
    whole_sums: ZeRO 1 reduces gradients as without sharding, and each rank takes its part.
    fused: operators that are one kernel each. optimizer_bytes: moved a parameter, when not by one
        kernel. gradient_bytes: moved a parameter by each micro-batch, when not as we do.
        Given, weights stand in the compute type beside what is stored, whatever ZeRO's level, and
        sums of gradients are whole all the time.
    operators: what calibration found, by an operator's name: launches and share of the rate
        predicted here, forward, and the same backward. UPDATE is the optimizer's.
    collectives: (kind, rounds of latency, share of the link's rate), inside a node.
    kernels: what tuning found of kernels in the compute type.
    held_bytes, part_bytes: held besides, of each parameter here and of each that is updated here;
        bucket_elements: and of a flat copy of gradients, the largest weight's not counted.
    regathers: an input that tensor ranks gather for a product is kept as it was, and gathered
        again in the backward. spare_gradients: a gradient of each shape of weight is kept for all
        products to return, their sums being elsewhere.
    early_stop: a block that runs again stops at the last value that its backward keeps.
    whole_logits: they are a value of their own.
    peak_flops: the nominal one that utilisation is a share of.
    link, network: bytes/s one way inside a node and, per device, between nodes.
    host_link: bytes/s one way to host memory; host_update: that the CPU's share of one device
        moves as it updates weights there.
    pinned: host memory is another memory, and pinned; copies_overlap: with computing.
    """

    matrix_flops: float
    attention_flops: float
    vector_flops: float
    peak_flops: float
    memory_bytes_per_s: float
    launch_s: float
    link_bytes_per_s: float
    link_latency_s: float
    network_bytes_per_s: float
    network_latency_s: float
    devices_per_node: int
    host_link_bytes_per_s: float
    host_update_bytes_per_s: float
    pinned: bool
    copies_overlap: bool
    fixed_bytes: int
    overlap: float
    multiprocessors: int
    gather_overlap: float = 0.0
    cut_sends: bool = False
    ring_share: float = 1.0
    whole_sums: bool = False
    fused: frozenset[str] = frozenset()
    optimizer_bytes: float | None = None
    gradient_bytes: float | None = None
    held_bytes: float = 0.0
    part_bytes: float = 0.0
    bucket_elements: float = 0.0
    regathers: bool = False
    spare_gradients: bool = False
    early_stop: bool = True
    whole_logits: bool = False
    operators: Mapping[str, tuple[float, ...]] = field(default_factory=dict, hash=False)
    collectives: tuple[tuple[str, float, float], ...] = ()
    kernels: Measured = NOTHING

    @property
    def short_weights(self) -> bool:
        return self.gradient_bytes is not None

    def forward_s(self, name: str, bare_s: float, launches: float = 1.0) -> float:
        """Of an operator that takes `bare_s` at this device's rates."""
        return self._paced_s(self.operators.get(name, ())[:2], bare_s, launches)

    def backward_s(self, name: str, bare_s: float, launches: float = 1.0) -> float:
        return self._paced_s(self.operators.get(name, ())[2:], bare_s, launches)

    def besides_s(self, name: str, bare_s: float, *, forward: bool) -> float:
        """Of what counts as nothing unless it was measured: the host's work around a weight or a
        unit of ZeRO's. GPUs have it behind their queue."""
        found = self.operators.get(name, ())
        return self._paced_s(found[:2] if forward else found[2:], bare_s, 0.0) if found else 0.0

    def _paced_s(self, found: tuple[float, ...], bare_s: float, launches: float) -> float:
        launches, share = found or (launches, 1.0)
        return bare_s / share + launches * self.launch_s


def machine_of(cluster: Cluster, types: Types) -> Machine:
    device = cluster.device
    defaults = GPU_CONSTANTS if device.kind is DeviceKind.GPU else CPU_CONSTANTS
    known = defaults | dict(device.constants)
    peak = peak_flops(dict(device.peak_flops), types)
    link = device.link_bytes_per_s
    if link is None:
        host = device.host_link_bytes_per_s
        link = CPU_LINK_BYTES_PER_S if device.kind is DeviceKind.CPU or host is None else host
    peak_kept = peak * known["sustained"]
    return Machine(
        matrix_flops=peak_kept * known["matmul_efficiency"],
        attention_flops=peak_kept * known["attention_efficiency"],
        vector_flops=dict(device.peak_flops).get("fp32", peak) * 0.5,
        peak_flops=peak,
        memory_bytes_per_s=device.memory_bytes_per_s
        * known["memory_efficiency"]
        * known["sustained"],
        launch_s=known["launch_s"],
        link_bytes_per_s=link * known["link_efficiency"],
        link_latency_s=known["link_latency_s"],
        network_bytes_per_s=cluster.network_bytes_per_s * known["network_efficiency"],
        network_latency_s=known["network_latency_s"],
        devices_per_node=cluster.devices_per_node,
        host_link_bytes_per_s=host_link_bytes_per_s(device) * known["host_link_efficiency"],
        host_update_bytes_per_s=_host_update(cluster, known),
        pinned=device.kind is DeviceKind.GPU,
        copies_overlap=device.kind is DeviceKind.GPU,
        fixed_bytes=int(known["fixed_bytes"]),
        overlap=known["overlap"],
        multiprocessors=int(known["multiprocessors"]),
        gather_overlap=known.get("gather_overlap", known["overlap"]),
        cut_sends=known.get("cut_sends", 0.0) > 0,
        ring_share=known.get("ring_share", 1.0),
        whole_sums=known.get("whole_sums", 0.0) > 0,
        fused=frozenset(
            k.removeprefix(FUSED) for k, v in known.items() if v and k.startswith(FUSED)
        ),
        optimizer_bytes=known.get(OPTIMIZER_BYTES),
        gradient_bytes=known.get(GRADIENT_BYTES),
        held_bytes=known.get(HELD_BYTES, 0.0),
        part_bytes=known.get(PART_BYTES, 0.0),
        bucket_elements=known.get(BUCKET_ELEMENTS, 0.0),
        regathers=known.get("regathers", 0.0) > 0,
        spare_gradients=known.get("spare_gradients", 0.0) > 0,
        early_stop=known.get("early_stop", 1.0) > 0,
        whole_logits=known.get("whole_logits", 0.0) > 0,
        operators=_operators(cluster),
        collectives=_collectives(cluster),
        kernels=measured_of(cluster, types.compute, known["sustained"]),
    )


UPDATE, WEIGHT, UNIT = "update", "weight", "unit"
"""Among a device's `operators`: the optimizer's step and the clipping before it; a use of a weight
that tensor ranks share; a unit of ZeRO's, which is copied out of its gather and into its
reduction."""
ROWS = {UPDATE: 2, WEIGHT: 4, UNIT: 4}
"""How many numbers these have."""


def _operators(cluster: Cluster) -> dict[str, tuple[float, ...]]:
    """Errors: Unsupported for a name that the dialect does not have."""
    for name, numbers in cluster.device.operators.items():
        known = name in ROWS or name in BY_NAME
        if not known or len(numbers) != ROWS.get(name, 4):
            raise Unsupported(f"`{name}` among the `operators` of a device", cluster.span)
    return dict(cluster.device.operators)


def _collectives(cluster: Cluster) -> tuple[tuple[str, float, float], ...]:
    kinds = {str(k) for k in Collective} - {str(Collective.NONE), str(Collective.SLICE)}
    for name in cluster.device.collectives:
        if name not in kinds:
            raise Unsupported(f"`{name}` among the `collectives` of a device", cluster.span)
    return tuple((k, r, share) for k, (r, share) in sorted(cluster.device.collectives.items()))


def host_link_bytes_per_s(device: Device) -> float:
    """One way. A CPU's copy reads and writes the one memory."""
    if device.kind is DeviceKind.CPU:
        return device.memory_bytes_per_s / 2
    return device.host_link_bytes_per_s or GPU_HOST_LINK_BYTES_PER_S


def _host_update(cluster: Cluster, known: dict[str, float]) -> float:
    if cluster.device.kind is DeviceKind.CPU:
        return cluster.device.memory_bytes_per_s * known["memory_efficiency"]
    return known["host_update_bytes_per_s"] / cluster.devices_per_node


def peak_flops(peaks: dict[str, float], types: Types) -> float:
    """The rate of the first type that the device has: what is asked for, then ever wider ones."""
    for name in (types.matrix, "fp16", "tf32", "fp32"):
        if name in peaks and (name != "tf32" or types.matrix != "fp32"):
            return peaks[name]
    return next(iter(peaks.values()))
