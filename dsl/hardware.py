"""`gpu`, `cpu` and `cluster` sections in; `Device` and `Cluster` out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import SpecError, did_you_mean, fault, listing, shown
from llmspec.dsl.kernels import kernels_of
from llmspec.dsl.measured import TABLES, factors
from llmspec.dsl.program import Cluster, Device, DeviceKind, Span
from llmspec.dsl.sources import LIBRARY, Scope, Sources
from llmspec.dsl.tuned import TunedKernels
from llmspec.dsl.units import Dimension, Measure
from llmspec.dsl.values import evaluate, in_units, plain, whole

HARDWARE = LIBRARY / "hardware"
CLUSTER_KEYS = ("node", "nodes", "network", "host_memory", "price", "kernels")
DEVICE_KEYS = (*("memory", "usable", "peak", "link", "host_link", "network", "price", "also"),)
COUNT = "multiprocessors"
LATENCIES = ("launch", "link_latency", "network_latency")
EFFICIENCIES = (
    *("matmul_efficiency", "attention_efficiency", "memory_efficiency"),
    *("link_efficiency", "network_efficiency"),
)
CONSTANTS = {
    "launch": "launch_s",
    "link_latency": "link_latency_s",
    "network_latency": "network_latency_s",
    "fixed": "fixed_bytes",
    COUNT: COUNT,
    **{name: name for name in EFFICIENCIES},
}
"""Key in a device's section -> its name in `Device.constants`."""

OPTIONAL = ("sustained", "host_link_efficiency")
"""Constants with a default by the kind of device (compiler/cost/hardware.py)."""
ALL_DEVICE_KEYS = (*DEVICE_KEYS, *CONSTANTS, *OPTIONAL, *TABLES)

DEFAULTS: Mapping[str, float] = {
    "launch_s": 5e-6,
    "link_latency_s": 5e-6,
    "network_latency_s": 10e-6,
    "fixed_bytes": 1.5 * 2**30,
    "matmul_efficiency": 0.75,
    "attention_efficiency": 0.5,
    "memory_efficiency": 0.85,
    "link_efficiency": 0.75,
    "network_efficiency": 0.75,
}
"""For a GPU that says nothing: near the middle of the library's own values (library/hardware)."""

GPU_MULTIPROCESSORS = 132.0
"""Where a GPU does not say: H100's."""

PEAK_TYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4")
HOST_SHARE = 1.25
"""Host memory of a node that says nothing, in times its devices' memory: less than systems that
people build have. 2 TB stand beside 8 x 180 GB (DGX B200: 1.4), 8 x 141 GB (DGX H200: 1.8) and
8 x 80 GB (DGX H100, DGX A100: 3.1), 1152 GiB beside 8 x 40 GB (AWS p4d: 3.6), 488 GiB beside
8 x 16 GB (AWS p3: 3.8); a part of it is the system's."""
DEFAULT_NETWORK = 100e9 / 8
"""Bytes/s per device between nodes when neither cluster nor device says: one 100 Gb/s port each."""


def normal(name: str) -> str:
    """How device names are compared: without case, spaces, dashes and underscores."""
    return re.sub(r"[\s_\-]+", "", name).lower()


# --------------------------------------------------------------------------------------------------
# The catalogue

HEADER = re.compile(r'^(?:gpu|cpu)[ \t]*(?:"([^"\n]*)")?[ \t]*\{', re.MULTILINE)
QUOTED = re.compile(r'"([^"]*)"')
ALIASES = re.compile(r"^[ \t]*also[ \t]*=[ \t]*\[([^\]]*)\]", re.MULTILINE)


@cache
def catalogue() -> dict[str, tuple[tuple[str, Path], ...]]:
    """Normal name -> the devices it may mean (id, file). Only names are read here."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(HARDWARE.glob("*.llmspec")):
        text = path.read_text(encoding="utf-8")
        heads = list(HEADER.finditer(text))
        for head, following in zip(heads, [*heads[1:], None], strict=True):
            body = text[head.end() : following.start() if following else len(text)]
            device = head.group(1) or "cpu"
            also = ALIASES.search(body)
            names = [device, *(QUOTED.findall(also.group(1)) if also else [])]
            for name in dict.fromkeys(map(normal, names)):
                found.setdefault(name, []).append((device, path))
    return {name: tuple(devices) for name, devices in found.items()}


def device_names() -> list[str]:
    """Every id in the catalogue."""
    return sorted({device for devices in catalogue().values() for device, _ in devices})


@cache
def spelled_names() -> tuple[str, ...]:
    """Ids and other names as people write them, for near misses."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(HARDWARE.glob("*.llmspec"))]
    groups = [group for text in texts for group in ALIASES.findall(text)]
    also = [name for group in groups for name in QUOTED.findall(group)]
    return tuple(dict.fromkeys([*also, *device_names()]))


def find_device(name: str, kind: str, scope: Scope, sources: Sources, span: Span) -> Device:
    wanted = normal(name)
    for (section_kind, own), (section, _) in scope.sections.items():
        if section_kind == kind and wanted in (normal(own or kind), *map(normal, also_of(section))):
            return device_of(section)
    choices = catalogue().get(wanted, ())
    exact = [c for c in choices if normal(c[0]) == wanted]
    choices = tuple(exact) or choices
    if not choices:
        known = [*spelled_names(), *(n for k, n in scope.sections if k == kind)]
        near = did_you_mean(name, known, otherwise=f'describe it: `{kind} "{shown(name)}" {{ … }}`')
        raise fault("E0304", f"no {kind} named `{shown(name)}` is known", span, helps=near)
    if len(choices) > 1:
        raise fault(
            "E0305",
            f"`{shown(name)}` may be one of {len(choices)} devices",
            span,
            helps=("write " + listing(c[0] for c in choices),),
        )
    device, path = choices[0]
    library = sources.open(f"library/hardware/{path.name}", str(path), None, (), span)
    for (_, own), (section, _) in library.sections.items():
        if (own or "cpu") == device:
            return device_of(section)
    raise AssertionError(f"{path.name} lost {device} between two readings")


def also_of(section: syntax.Section) -> list[str]:
    for statement in section.body:
        if isinstance(statement, syntax.Setting) and statement.key.text == "also":
            value = evaluate(statement.value)
            return [v for v in value if isinstance(v, str)] if isinstance(value, tuple) else []
    return []


# --------------------------------------------------------------------------------------------------
# One device


def settings_of(
    body: Iterable[syntax.Statement], keys: Iterable[str], what: str
) -> dict[str, syntax.Setting]:
    """A section's lines by key. Errors: Fault for other statements, unknown keys, repeated ones."""
    known = tuple(keys)
    found: dict[str, syntax.Setting] = {}
    for statement in body:
        if not isinstance(statement, syntax.Setting):
            raise fault("E0501", f"a {what} is a list of `key = value` lines", statement.span)
        name = statement.key.text
        if name not in known:
            raise unknown_key(what, name, known, statement.key.span)
        if name in found:
            raise fault(
                "E0217",
                f"`{name}` is given twice",
                statement.key.span,
                "here again",
                secondary=((found[name].key.span, "first here"),),
            )
        found[name] = statement
    return found


def unknown_key(what: str, name: str, known: Iterable[str], span: Span) -> Exception:
    known = tuple(known)
    otherwise = "the keys are " + ", ".join(f"`{k}`" for k in known)
    return fault(
        "E0502",
        f"`{shown(name)}` is not a key of a {what}",
        span,
        helps=did_you_mean(name, known, otherwise=otherwise),
    )


def equal_only(setting: syntax.Setting) -> syntax.Node:
    if setting.relation != "=":
        raise fault("E0501", f"`{setting.key.text}` is given with `=`", setting.span)
    return setting.value


def device_of(section: syntax.Section) -> Device:
    kind = DeviceKind(section.kind)
    keys = settings_of(section.body, ALL_DEVICE_KEYS, f"`{section.kind}`")
    nodes = {key: equal_only(setting) for key, setting in keys.items()}
    for needed in ("memory", "peak"):
        if needed not in nodes:
            raise fault("E0503", f"a `{section.kind}` needs `{needed}`", section.head, "not given")
    memory, rate = memory_of(nodes["memory"])
    usable = memory
    if "usable" in nodes:
        usable = in_bytes(nodes["usable"], "usable")
        if usable > memory:
            raise fault("E0303", "`usable` is more than `memory`", nodes["usable"].span)
    constants = {**DEFAULTS, COUNT: 1.0 if kind is DeviceKind.CPU else GPU_MULTIPROCESSORS}
    constants.update({CONSTANTS[k]: constant(k, nodes[k]) for k in CONSTANTS if k in nodes})
    constants.update({k: constant(k, nodes[k]) for k in OPTIONAL if k in nodes})
    if "network" in nodes:
        constants["network_bytes_per_s"] = rate_per_device(nodes["network"], "network", None)
    return Device(
        name=section.name or section.kind,
        kind=kind,
        memory_bytes=memory,
        usable_bytes=usable,
        memory_bytes_per_s=rate,
        peak_flops=peaks(nodes["peak"]),
        link_bytes_per_s=tagged_rate(nodes["link"], "link") if "link" in nodes else None,
        host_link_bytes_per_s=(
            tagged_rate(nodes["host_link"], "host_link") if "host_link" in nodes else None
        ),
        price_per_hour=price(nodes["price"], {"hour": 1}) if "price" in nodes else None,
        constants=constants,
        **{key: factors(key, nodes[key]) for key in TABLES if key in nodes},
    )


def memory_of(node: syntax.Node) -> tuple[int, float]:
    if not isinstance(node, syntax.At):
        raise fault(
            "E0302",
            "a device's memory needs its bandwidth",
            node.span,
            helps=("it is written like `80 GiB at 3.35 TB/s`",),
        )
    rate = in_units(evaluate(node.rate), Dimension.BYTES_PER_S, node.rate.span, "the bandwidth")
    return in_bytes(node.size, "memory"), float(rate.value)


def in_bytes(node: syntax.Node, what: str) -> int:
    size = in_units(evaluate(node), Dimension.BYTES, node.span, f"`{what}`")
    return int(size.value)


def peaks(node: syntax.Node) -> dict[str, float]:
    if not isinstance(node, syntax.Record):
        raise fault(
            "E0302",
            "`peak` names one rate per type of number",
            node.span,
            helps=("it is written like `{ bf16: 989 TFLOP/s, fp32: 67 TFLOP/s }`",),
        )
    found: dict[str, float] = {}
    for name, value in node.entries:
        if name.text not in PEAK_TYPES:
            raise unknown_key("`peak`", name.text, PEAK_TYPES, name.span)
        if name.text in found:
            raise fault("E0217", f"`{name.text}` is given twice", name.span)
        rate = in_units(
            evaluate(value), Dimension.OPERATIONS_PER_S, value.span, f"the peak of `{name.text}`"
        )
        found[name.text] = float(rate.value)
    if "fp32" not in found and "bf16" not in found:
        raise fault("E0503", "`peak` needs `bf16` or `fp32`", node.span)
    return found


def tagged_rate(node: syntax.Node, what: str) -> float:
    """`nvlink 450 GB/s`; the word is for people."""
    quantity = node.quantity if isinstance(node, syntax.Tagged) else node
    measure = in_units(evaluate(quantity), Dimension.BYTES_PER_S, quantity.span, f"`{what}`")
    return float(measure.value)


def constant(key: str, node: syntax.Node) -> float:
    if key == "fixed":
        return float(in_bytes(node, key))
    value = evaluate(node)
    if key == COUNT:
        return float(whole(value, node.span, f"`{key}`", least=1))
    if key in LATENCIES:
        return float(in_units(value, Dimension.SECONDS, node.span, f"`{key}`").value)
    if plain(value) and isinstance(value, int | float) and 0 < value <= 1:
        return float(value)
    raise fault("E0303", f"`{key}` must be more than 0, and at most 1", node.span)


def price(node: syntax.Node, per: Mapping[str, int]) -> float:
    """Of one device for an hour. per: what it may be given per, and how many devices that is."""
    value = evaluate(node)
    if isinstance(value, Measure) and value.dimension == Dimension.NUMBER and value.value >= 0:
        devices = per.get(value.per or "")
        if devices is not None:
            return float(value.value) / devices
    written = listing(f"2.50 per {what}" for what in per if what != "device hour")
    raise fault("E0302", "a `price` is a number per hour", node.span, f"like {written}")


def rate_per_device(node: syntax.Node, what: str, per_node: int | None) -> float:
    """per_node: devices in a node, which share what is given `per node`."""
    rate = in_units(evaluate(node), Dimension.BYTES_PER_S, node.span, f"`{what}`")
    if rate.per in ("gpu", "device"):
        return float(rate.value)
    if rate.per == "node" and per_node is not None:
        return float(rate.value) / per_node
    raise fault(
        "E0302",
        f"`{what}` does not say per what",
        node.span,
        helps=("it is written like `400 Gb/s per gpu`" + (" or `… per node`" if per_node else ""),),
    )


# --------------------------------------------------------------------------------------------------
# Clusters


def cluster_of(section: syntax.Section, scope: Scope, sources: Sources) -> Cluster:
    keys = settings_of(section.body, CLUSTER_KEYS, "cluster")
    if "node" not in keys:
        raise fault(
            "E0503",
            "a cluster needs `node`",
            section.head,
            "not given",
            helps=('write `node = 8 * gpu("H100-SXM")`',),
        )
    count, device = node_of(equal_only(keys["node"]), scope, sources)
    nodes, bound = nodes_of(keys["nodes"]) if "nodes" in keys else (1, False)
    if count * nodes > 1_000_000:
        raise fault("E0303", "a cluster has at most 1_000_000 devices", section.head)
    network = device.constants.get("network_bytes_per_s", DEFAULT_NETWORK)
    if "network" in keys:
        network = rate_per_device(equal_only(keys["network"]), "network", count)
    host_memory = default_host_memory(device, count)
    if "host_memory" in keys:
        host_memory = bytes_per_node(equal_only(keys["host_memory"]), "host_memory")
    if "price" in keys:
        per = {"gpu hour": 1, "device hour": 1, "node hour": count}
        device = replace(device, price_per_hour=price(equal_only(keys["price"]), per))
    return Cluster(
        name=section.name or "cluster",
        device=device,
        devices_per_node=count,
        nodes=nodes,
        nodes_are_bound=bound,
        nodes_span=keys["nodes"].span if "nodes" in keys else None,
        network_bytes_per_s=network,
        host_memory_bytes=host_memory,
        kernels=named_kernels(equal_only(keys["kernels"]), scope) if "kernels" in keys else None,
        span=section.span,
    )


def named_kernels(node: syntax.Node, scope: Scope) -> TunedKernels:
    known = {name: one for (kind, name), (one, _) in scope.sections.items() if kind == "kernels"}
    name = node.text if isinstance(node, syntax.Name) else ""
    if name not in known:
        otherwise = "`llmspec tune` measures them, and writes `kernels NAME { … }`"
        raise fault(
            "E0201",
            f"no kernels named `{shown(name)}` are known"
            if name
            else "`kernels` is the name of such a section",
            node.span,
            helps=did_you_mean(name, known, otherwise=otherwise),
        )
    return kernels_of(known[name])


def nodes_of(setting: syntax.Setting) -> tuple[int, bool]:
    """(how many, whether the search may take fewer)."""
    if setting.relation not in ("=", "<="):
        raise fault(
            "E0501",
            "`nodes` is given with `=`, or with `<=` to leave it to the search",
            setting.span,
        )
    value = setting.value
    return whole(evaluate(value), value.span, "`nodes`", least=1), setting.relation == "<="


def default_host_memory(device: Device, per_node: int) -> int:
    """On CPUs it is the devices' own."""
    share = 1.0 if device.kind is DeviceKind.CPU else HOST_SHARE
    return int(share * per_node * device.memory_bytes)


def bytes_per_node(node: syntax.Node, what: str) -> int:
    size = in_bytes(node, what)
    value = evaluate(node)
    if isinstance(value, Measure) and value.per == "node":
        return size
    raise fault(
        "E0302",
        f"`{what}` does not say per what",
        node.span,
        helps=("it is written like `1 TiB per node`",),
    )


def node_of(node: syntax.Node, scope: Scope, sources: Sources) -> tuple[int, Device]:
    """`8 * gpu("H100-SXM")`, `gpu("T4")`, `2 * cpu`."""
    count = 1
    if isinstance(node, syntax.Operation) and [op for op, _ in node.rest] == ["*"]:
        count = whole(evaluate(node.first), node.first.span, "the number of devices", least=1)
        node = node.rest[0][1]
    match node:
        case syntax.Name(text="cpu"):
            return count, find_device("cpu", "cpu", scope, sources, node.span)
        case syntax.Call(function=syntax.Name(text="gpu" | "cpu"), arguments=(one,)) if isinstance(
            one.value, syntax.Text
        ):
            kind = node.function.text
            return count, find_device(one.value.value, kind, scope, sources, one.span)
        case syntax.Name(text=name) if normal(name) in catalogue():
            raise fault(
                "E0304", "a GPU is named in quotes", node.span, helps=(f'write `gpu("{name}")`',)
            )
    raise fault(
        "E0304",
        "this is not a device",
        node.span,
        helps=('a node is written like `8 * gpu("H100-SXM")` or `2 * cpu`',),
    )


WORDS = re.compile(r"\s*(?:(\d{1,6})\s*[xX×*]\s*)?(?:(\d{1,6})\s*[xX×*]\s*)?(\S.*?)\s*")


def cluster_from_words(words: str) -> Cluster:
    """`8xH100`: one node of 8; `4x8xH100`: four of them; `2xcpu`. Errors: SpecError."""
    sources = Sources(texts={"command line": words})
    span = Span("command line", 1, 1, 1, len(words) + 1)
    empty = Scope("command line", syntax.File(path="command line", text=words, declarations=()))
    try:
        match = WORDS.fullmatch(words)
        if match is None:
            raise fault("E0304", "no device is named", span, helps=("write it like `8xH100`",))
        first, second, name = match.groups()
        nodes, count = (int(first), int(second)) if second else (1, int(first or 1))
        if not 1 <= nodes * count <= 1_000_000:
            raise fault("E0303", "a cluster has from 1 to 1_000_000 devices", span)
        kind = "cpu" if normal(name) == "cpu" else "gpu"
        device = find_device(name, kind, empty, sources, span)
    except Exception as error:
        diagnostic = getattr(error, "diagnostic", None)
        if diagnostic is None:
            raise
        raise SpecError([diagnostic], sources.texts) from None
    return Cluster(
        name=words.strip(),
        device=device,
        devices_per_node=count,
        nodes=nodes,
        network_bytes_per_s=device.constants.get("network_bytes_per_s", DEFAULT_NETWORK),
        host_memory_bytes=default_host_memory(device, count),
        span=span,
    )
