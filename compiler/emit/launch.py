"""Print how to start a program: launch.sh (torchrun), launch.sbatch (Slurm), launch.yaml
(Kubernetes).
"""

from __future__ import annotations

import re

import jinja2

from llmspec.compiler.emit.header import Header
from llmspec.compiler.plan import Plan
from llmspec.compiler.text import quoted
from llmspec.dsl.program import DeviceKind, Program


def job_name(text: str) -> str:
    """A name that shells, Slurm and Kubernetes all take."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "train"


def print_launchers(program: Program, plan: Plan) -> dict[str, str]:
    """File name -> text."""
    world = plan.mesh.world_size
    per_node = min(program.cluster.devices_per_node, world)
    nodes = -(-world // per_node)
    values = {
        "header": Header(plan, quoted(plan.spec)).lines()[0],
        "name": job_name(plan.train),
        "folder": f"build/{plan.train}",
        "nodes": nodes,
        "per_node": per_node,
        "cpu": program.cluster.device.kind is DeviceKind.CPU,
        "roles": [("Master", 1)] + [("Worker", nodes - 1)] * (nodes > 1),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmspec.compiler.emit"), keep_trailing_newline=True
    )
    names = ("launch.sh", "launch.sbatch", "launch.yaml")
    return {n: environment.get_template(f"{n}.jinja").render(values) for n in names}
