"""The lines of train.py that say what each pipeline rank does in a step."""

from __future__ import annotations

from llmspec.compiler.emit.train_file import TrainFile
from llmspec.compiler.orders import Schedule

MOST_WORDS = 500
"""Actions that train.py spells out, some 50 lines; nobody reads more, and it takes them from
plan.json."""


def print_actions(file: TrainFile) -> None:
    file.text.blank()
    file.text.line("# what each pipeline rank does in a step: stage, action, micro-batch")
    if Schedule(file.plan.schedule).splits:
        file.text.line("# I: the part of a backward that the stage before waits for; W, when")
        file.text.line("# there is time, the rest of it: the gradients of matrices")
    if name := actions_reader(file):
        total = sum(map(len, file.plan.actions))
        file.text.line(f"# {total:_} of them, in plan.json; report.html draws them")
        file.text.line(f'ACTIONS = {name}(FOLDER / "plan.json")')
        return
    if not file.ramp:
        with file.text.block("ACTIONS = {"):
            print_lists(file, file.plan.actions)
        file.text.line("}")
        return
    file.text.line("# by the number of micro-batches, which grows with the batch")
    with file.text.block("ACTIONS = {"):
        whole = {str(file.plan.microbatches): file.plan.actions}
        for count, lists in (file.plan.ramp_actions | whole).items():
            with file.text.block(f"{count}: {{"):
                print_lists(file, lists)
            file.text.line("},")
    file.text.line("}")


def actions_reader(file: TrainFile) -> str:
    """What reads lists that are too long to be spelled out; "" for others."""
    if sum(map(len, file.plan.actions)) <= MOST_WORDS:
        return ""
    return "planned_actions_by_count" if file.ramp else "planned_actions"


def print_lists(file: TrainFile, lists: tuple[tuple[str, ...], ...]) -> None:
    for rank, words in enumerate(lists):
        with file.text.block(f"{rank}: ("):
            line = ""
            for word in words:
                if len(line) + len(word) > 84:
                    file.text.line(f'"{line.strip()} "')
                    line = ""
                line += f" {word}"
            file.text.line(f'"{line.strip()}"')
        file.text.line(").split(),")
