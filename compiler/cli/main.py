"""`llmspec VERB …`: the argument parser, and which function each verb is."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from llmspec.compiler.cli import calibrating, language, planning, running, simulating, tuning
from llmspec.compiler.cli.console import show_faults
from llmspec.dsl import SpecError


class Verbs:
    """The parser, and the arguments that several verbs share."""

    def __init__(self) -> None:
        self.top = argparse.ArgumentParser(
            prog="llmspec",
            description="From a small spec to the parallel training program an expert would write.",
        )
        self.known = self.top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(self, name: str, run: Callable[[Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = self.known.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print data instead of text")
        return sub


def parser() -> argparse.ArgumentParser:
    verbs = Verbs()
    _language(verbs)
    _planning(verbs)
    _running(verbs)
    _measuring(verbs)
    return verbs.top


def _spec(verb: argparse.ArgumentParser, what: str = "the .llmspec file, or a saved plan") -> None:
    verb.add_argument("spec", help=what)
    _which(verb)


def _which(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--train", metavar="NAME", help="which train block, if there are several")
    verb.add_argument("--trust", action="store_true", help="let the file of a python(…) model run")


def _out(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-o", "--out", metavar="FOLDER", help="default: build/NAME by the spec")


def _language(verbs: Verbs) -> None:
    new = verbs.add("new", language.new, "write a starter spec")
    new.add_argument("path", help="the file to write")
    new.add_argument("--force", action="store_true", help="overwrite it if it is there")

    check = verbs.add("check", language.check, "report every fault of a spec")
    check.add_argument("spec", help="the .llmspec file")

    fmt = verbs.add("fmt", language.fmt, "format specs in place")
    fmt.add_argument("specs", nargs="+", help="the .llmspec files")
    fmt.add_argument("--check", action="store_true", help="change nothing; exit 3 if it would")

    explain = verbs.add("explain", language.explain, "the longer story of an error code")
    explain.add_argument("code", help="E0203, say")


def _planning(verbs: Verbs) -> None:
    fit = verbs.add("fit", planning.fit, "does a library model fit on these devices, and how fast")
    fit.add_argument("model", help="a model of the library: llama3_8b, say")
    fit.add_argument("--on", required=True, metavar="8xH100", help="the devices")
    fit.add_argument("--seq", type=int, metavar="T", help="tokens per sequence")
    fit.add_argument("--batch", type=int, metavar="N", help="sequences per step")

    plan = verbs.add("plan", planning.plan, "search, and show the plan with its predictions")
    _spec(plan, "the .llmspec file")
    plan.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    plan.add_argument("--check", metavar="FILE", help="exit 3 if the plan differs from this one")
    asked = plan.add_mutually_exclusive_group()
    asked.add_argument(
        "--memory", action="store_true", help="what memory holds at the peak, item by item"
    )
    asked.add_argument(
        "--pareto", action="store_true", help="memory against time: the plans that nothing beats"
    )
    asked.add_argument(
        "--why-not", metavar="PINS", help='"tensor = 4, pipeline = 2": their best beside the plan'
    )
    asked.add_argument("--explicit", action="store_true", help="print the spec, defaults filled in")

    diff = verbs.add(
        "diff", planning.diff, "what differs between two plans; exit 3 if anything does"
    )
    for name in ("before", "after"):
        diff.add_argument(name, help="a saved plan, or a .llmspec file to search")
    _which(diff)

    compile_ = verbs.add("compile", planning.compile_, "emit the training program")
    _spec(compile_)
    _out(compile_)


def _running(verbs: Verbs) -> None:
    verify = verbs.add(
        "verify", running.verify, "compare the emitted program with one device, in float64"
    )
    _spec(verify)

    dry = verbs.add(
        "dryrun", running.dryrun, "execute the emitted program at full size, on fake tensors"
    )
    _spec(dry)

    simulate = verbs.add(
        "simulate", simulating.simulate, "play one step event by event, and write it as a trace"
    )
    _spec(simulate)
    simulate.add_argument(
        "-o", "--out", metavar="FILE", help="the trace; default: build/NAME/trace.json by the spec"
    )

    train = verbs.add("train", running.train, "compile, and run torchrun on this machine")
    _spec(train)
    _out(train)


def _measuring(verbs: Verbs) -> None:
    calibrate = verbs.add(
        "calibrate", calibrating.calibrate, "measure this machine, and write it down as a cluster"
    )
    calibrate.add_argument(
        "path", nargs="?", default="here.llmspec", help="the file to write; default: here.llmspec"
    )
    calibrate.add_argument("--force", action="store_true", help="overwrite it if it is there")
    calibrate.add_argument(
        "--processes", type=int, metavar="N", help="default: every GPU, or 2 on the CPU"
    )

    tune = verbs.add(
        "tune", tuning.tune, "measure a spec's kernels on this GPU, and write the best tiles down"
    )
    _spec(tune, "the .llmspec file")
    tune.add_argument(
        "path",
        nargs="?",
        default="here.llmspec",
        help="the hardware file that gets them; default: here.llmspec",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        code = options.run(options)
    except SpecError as error:
        code = show_faults(error, as_data=options.json)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
